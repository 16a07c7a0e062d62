"""Both sides of `WatchRollouts`: events down, as fast as they are taken, and on the client a watch that outlives its
connections."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import Message
from grpc.aio import AioRpcError
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.codec.building import build
from lightning.rpc.errors import StoreDrainingError, StreamAgedError
from lightning.rpc.loop import end_call
from lightning.store.polling import RevisionGoneError
from lightning.types import RolloutEvent

if TYPE_CHECKING:
    from lightning.rpc.connection import Connection
    from lightning.rpc.service import StoreService

_MAX_AGE_SECONDS = 3600.0
"""A stream's deadline; then it is opened anew."""
_DRAINING = object()


async def watch_rollouts(
    service: StoreService, request: pb.WatchRolloutsRequest
) -> AsyncGenerator[Message, None]:
    """The server's side. The next event is asked for when the last one is on its way, so none wait here."""
    after = request.after_revision if request.HasField("after_revision") else None
    watch = service.store.watch_rollouts(rollout_ids=list(request.rollout_ids), after_revision=after)
    age = service.limits.max_connection_age
    until = math.inf if age is None else time.monotonic() + age

    async def next_event() -> Any:
        left = None if age is None else until - time.monotonic()
        return await asyncio.wait_for(anext(watch, None), left)

    async with aclosing(watch):
        while True:
            try:
                event = await service.interruptible(next_event(), _DRAINING)
            except asyncio.TimeoutError:
                if time.monotonic() < until:
                    raise  # it is the store's
                raise StreamAgedError(f"the watch was open for {age:g} s; go on from there") from None
            if event is _DRAINING:
                raise StoreDrainingError(
                    "the server is shutting down; go on elsewhere, or here when it is back"
                )
            if event is None:
                return
            yield codec.event_to_proto(event)


class ClientWatch:
    """The client's side: takes one event at a time off a stream, and opens the stream again where it broke.

    Args:
        connection: To the server.
        rollout_ids: What to watch.
        after_revision: Where to begin.
    """

    def __init__(
        self, connection: Connection, rollout_ids: Sequence[str], after_revision: int | None
    ) -> None:
        self._connection = connection
        self._rollout_ids = list(rollout_ids)
        self._after = after_revision
        self._stream: Any = None
        self._events: list[RolloutEvent] = []
        """What came with the last message and was not taken yet, the next one last."""
        self._told: dict[str, int] = {}
        """The revision of each rollout that was told last."""

    async def next(self) -> RolloutEvent | None:
        """The next event; None when all rollouts have ended. Raises as `Connection.unary`."""
        while True:
            while self._events:
                event = self._events.pop()
                self._after = event.progress_revision
                if self._told.get(event.rollout.rollout_id, -1) < event.revision:
                    self._told[event.rollout.rollout_id] = event.revision
                    return event
            try:
                message = await self._connection.retrying(self._read)
            except RevisionGoneError:
                if not self._told:
                    raise
                # the store behind the server is another now: begin again with how things are
                self._after = None
                self._told.clear()
                continue
            if message is grpc.aio.EOF:
                return None
            self._events = codec.events_from_proto(message, self._after or 0)[::-1]

    async def close(self) -> None:
        """End the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await end_call(stream)

    async def _read(self) -> Any:
        if self._stream is None:
            request = build(
                pb.WatchRolloutsRequest, rollout_ids=self._rollout_ids, after_revision=self._after
            )
            self._stream = self._connection.stub().WatchRollouts(request, timeout=_MAX_AGE_SECONDS)
        try:
            return await self._stream.read()
        except AioRpcError:
            self._stream = None
            raise
