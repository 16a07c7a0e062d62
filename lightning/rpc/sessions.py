"""The client's side of a worker session: commands that the server pushes, kept until somebody asks for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc.aio
from grpc.aio import AioRpcError
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.rpc.errors import is_connection_failure
from lightning.rpc.loop import end_call
from lightning.types import WorkerCommand

if TYPE_CHECKING:
    from lightning.rpc.connection import Connection

_MAX_PENDING_COMMANDS = 1024
"""Older ones are dropped for newer ones: who does not ask learns from the reply to the next heartbeat."""
_ABANDONED_AFTER_SECONDS = 120.0
_MAX_AGE_SECONDS = 3600.0
"""The stream's deadline; then it is opened anew."""
_REOPEN_PAUSE_SECONDS = 0.1


class CommandSession:
    """Listens for one worker process, on a stream that it opens again when it breaks.

    It starts with the first `receive` and ends when nobody has called that for two minutes.
    """

    def __init__(self, connection: Connection, worker_id: str, instance_id: str | None) -> None:
        self._connection = connection
        self._hello = pb.WorkerSessionRequest(
            hello=pb.WorkerSessionRequest.Hello(worker_id=worker_id, instance_id=instance_id)
        )
        self._pending: deque[WorkerCommand] = deque(maxlen=_MAX_PENDING_COMMANDS)
        self._welcomed = asyncio.Event()
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self._readers = 0
        self._abandonment: asyncio.TimerHandle | None = None
        self._task = asyncio.get_running_loop().create_task(self._listen_for_good())

    @property
    def ended(self) -> bool:
        """Whether a new session is needed."""
        return self._task.done()

    def add_end_callback(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the session has ended."""
        self._task.add_done_callback(lambda _: callback())

    async def receive(self, timeout: float | None) -> Sequence[WorkerCommand]:
        """Wait up to `timeout` seconds (None: for ever) for commands, from when the server knows that we listen.

        Raises:
            StoreUnavailableError: The stream broke and the server stayed away.
            RuntimeError: Another stream of the same worker process took over, or the client was closed.
        """
        self._readers += 1
        if self._abandonment is not None:
            self._abandonment.cancel()
        try:
            await self._welcomed.wait()
            if timeout is None or timeout > 0:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), timeout)
            if not self._pending and self._failure is not None:
                raise self._failure
            self._news.clear()
            commands = list(self._pending)
            self._pending.clear()
            return commands
        finally:
            self._readers -= 1
            if not self._readers:
                self._abandonment = asyncio.get_running_loop().call_later(
                    _ABANDONED_AFTER_SECONDS, self._task.cancel
                )

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _listen_for_good(self) -> None:
        try:
            while True:
                await self._connection.retrying(self._listen)
                await asyncio.sleep(_REOPEN_PAUSE_SECONDS)
        except asyncio.CancelledError:
            if self._connection.closed:
                self._failure = self._connection.closed_error()
            raise
        except Exception as error:  # noqa: BLE001  # whoever receives next hears of it
            self._failure = error
        finally:
            if self._abandonment is not None:
                self._abandonment.cancel()
            self._welcomed.set()
            self._news.set()

    async def _listen(self) -> None:
        """Open the stream and read until it ends. Raises only what happened before it was open."""
        stream = self._connection.stub().WorkerSession(timeout=_MAX_AGE_SECONDS)
        opened = False
        try:
            await stream.write(self._hello)
            while (message := await stream.read()) is not grpc.aio.EOF:
                opened = True
                self._take(message)
        except AioRpcError as error:
            if not opened or not is_connection_failure(error):
                raise
        finally:
            await end_call(stream)

    def _take(self, message: pb.WorkerSessionResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self._welcomed.set()
        elif kind == "command":
            command = codec.command_from_proto(message.command)
            if command is not None:
                self._pending.append(command)
                self._news.set()
        elif kind == "closing" and message.closing.reason == pb.CLOSE_REASON_SUPERSEDED:
            raise RuntimeError(f"this worker's session was ended: {message.closing.message}")
