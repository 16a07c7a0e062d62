"""Requests that no honest client makes, of every method, and an honest client beside them.

`scripts/prove_network.py` makes them by the thousand, a test some hundreds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc import LightningStoreClient, loop
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout

_SERVICE = pb.DESCRIPTOR.services_by_name["LightningStoreService"]
_DEADLINE_SECONDS = 20.0
_PIPELINE = _SERVICE.methods_by_name["Pipeline"]
_PIPELINES = 0.2
"""The share of pipelines, each of which makes calls of other methods, among all requests."""
_TOO_MUCH_FOR_A_PIPELINE = bytes(5_000_000)
_MAY_WAIT = ("DequeueRollouts", "WaitForRollouts", "WatchRollouts", "Pipeline")
"""Methods that a request may well ask to wait beyond the deadline."""
_WAIT_SECONDS = 3.0
"""Their deadline."""
_OVERWRITTEN = "Internal error from Core"
"""What grpc.aio's client makes of the server's status when a message comes too late for a stream that the server has
refused already (https://github.com/grpc/grpc/issues/36066). The server was clear; it is asked again."""
_MOST_TRIES = 50


@dataclass
class Attacked:
    """How a server answered to hostile requests."""

    requests: int = 0
    repeated: int = 0
    """Requests that were made once more, as the client had lost the answer's status."""
    statuses: Counter[str] = field(default_factory=Counter)
    unclear: list[str] = field(default_factory=list)
    """Answers that are no clear status: the method, the status and the message."""
    served: int = 0
    """Rollouts that a valid client took from beginning to end meanwhile."""
    slowest_seconds: float = 0.0
    """The longest that this client waited for one of them."""


async def attack(address: str, *, requests: int, at_once: int = 16, seed: int = 0) -> Attacked:
    """Send hostile requests to all methods, while a valid client works.

    Args:
        address: The server.
        requests: How many.
        at_once: How many of them at the same time.
        seed: Of what is sent.
    """
    attacked = Attacked()
    client = LightningStoreClient(address)
    known = await client.start_rollout("known to the attacker")
    assailant = _Assailant(attacked, random.Random(seed), known)
    thread = loop.acquire()
    try:
        assault = asyncio.ensure_future(thread.run(assailant.run(address, requests, at_once)))
        while not assault.done() or not attacked.served:
            began = time.monotonic()
            await _work_well(client)
            attacked.served += 1
            attacked.slowest_seconds = max(attacked.slowest_seconds, time.monotonic() - began)
        await assault
    finally:
        loop.release()
        await client.close()
    return attacked


async def _work_well(client: LightningStoreClient) -> None:
    rollout = await client.start_rollout({"task": 1}, worker_id="honest")
    await client.deliver_spans([make_span(rollout, name="one")])
    await client.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    (span,) = await client.query_spans(rollout.rollout_id)
    (ended,) = await client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=_DEADLINE_SECONDS)
    if (span.name, ended.status) != ("one", "succeeded"):
        raise AssertionError(f"an honest client got {span} and {ended}")


class _Assailant:
    def __init__(self, attacked: Attacked, chance: random.Random, known: AttemptedRollout) -> None:
        self._attacked = attacked
        self._chance = chance
        self._texts = [
            *("", "\0", "latest", "ro-nobody", "../../etc/passwd", "\u202e", "a" * 300, "x" * 100_000),
            *(known.rollout_id, known.attempt.attempt_id, "' OR 1=1 --", "1" * 32, "2" * 16),
        ]
        self._blobs = [
            *(b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5_000, b"NaN", b"1e999", b"null", b"{}", b"[1]"),
            *(b'{"a":1,"a":2}', b'"\\ud800"', b"9" * 5_000, bytes(range(128, 192))),
        ]
        self._numbers = (0, 1, -1, 2, 7, 99, 2**31 - 1)
        self._doubles = (0.0, -1.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), 0.01)

    async def run(self, address: str, requests: int, at_once: int) -> None:
        room = asyncio.Semaphore(at_once)
        async with grpc.aio.insecure_channel(address) as channel:

            async def one() -> None:
                try:
                    await self._assault(channel)
                finally:
                    room.release()

            async with _all_of() as start:
                for _ in range(requests):
                    await room.acquire()
                    start(one())

    async def _assault(self, channel: grpc.aio.Channel) -> None:
        in_pipeline = self._chance.random() < _PIPELINES
        method = _PIPELINE if in_pipeline else self._chance.choice(_SERVICE.methods)
        messages = [self._message(method.input_type) for _ in range(self._chance.randrange(1, 4))]
        if in_pipeline and self._chance.random() < 0.1:
            messages.append(_TOO_MUCH_FOR_A_PIPELINE)
        if in_pipeline and self._chance.random() < 0.2:
            await _leave_unread(channel, messages * 50)
        for _ in range(_MOST_TRIES):
            status, message = await _outcome(channel, method, messages)
            if _OVERWRITTEN not in message:
                break
            self._attacked.repeated += 1
        self._attacked.requests += 1
        self._attacked.statuses[status.name] += 1
        waited = status is grpc.StatusCode.DEADLINE_EXCEEDED and method.name in _MAY_WAIT
        if not waited and not _is_clear(status, message):
            self._attacked.unclear.append(f"{method.name}: {status.name}: {message[:200]}")

    def _message(self, kind: Any) -> bytes:
        way = self._chance.randrange(4)
        if way == 0:
            return self._chance.randbytes(self._chance.choice((0, 1, 10, 1000)))
        data = bytearray(self._filled(GetMessageClass(kind), depth=0).SerializeToString())
        if way == 1 and data:
            for _ in range(self._chance.randrange(1, 4)):
                data[self._chance.randrange(len(data))] = self._chance.randrange(256)
        if way == 2:
            del data[self._chance.randrange(len(data) + 1) :]
        return bytes(data)

    def _filled(self, kind: type[Message], depth: int) -> Message:
        message = kind()
        for descriptor in kind.DESCRIPTOR.fields:
            if self._chance.random() < (0.3 if depth > 4 else 0.7) and depth < 30:
                self._fill(message, descriptor, depth)
        if isinstance(message, pb.PipelineRequest.Call) and self._chance.random() < 0.9:
            method = self._chance.choice(_SERVICE.methods)
            message.method, message.request = method.name, self._message(method.input_type)
        return message

    def _fill(self, message: Message, descriptor: Any, depth: int) -> None:
        target: Any = getattr(message, descriptor.name)
        kind = descriptor.message_type
        if kind is not None and kind.GetOptions().map_entry:
            return
        if descriptor.is_repeated:
            for _ in range(self._chance.randrange(3)):
                if kind is not None:
                    target.append(self._filled(GetMessageClass(kind), depth + 1))
                else:
                    target.append(self._scalar(descriptor))
        elif kind is not None:
            target.CopyFrom(self._filled(GetMessageClass(kind), depth + 1))
        else:
            setattr(message, descriptor.name, self._scalar(descriptor))

    def _scalar(self, descriptor: Any) -> Any:
        kind = descriptor.cpp_type
        choices: Any = self._numbers
        if kind == FieldDescriptor.CPPTYPE_STRING:
            choices = self._blobs if descriptor.type == FieldDescriptor.TYPE_BYTES else self._texts
        elif kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            choices = self._doubles
        elif kind == FieldDescriptor.CPPTYPE_BOOL:
            choices = (False, True)
        elif kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
            choices = [number for number in self._numbers if number >= 0]
        return self._chance.choice(choices)


async def _outcome(
    channel: grpc.aio.Channel, method: Any, messages: list[bytes]
) -> tuple[grpc.StatusCode, str]:
    up, down = method.client_streaming, method.server_streaming
    kind = f"{'stream' if up else 'unary'}_{'stream' if down else 'unary'}"
    call = getattr(channel, kind)(f"/{_SERVICE.full_name}/{method.name}")
    deadline = _WAIT_SECONDS if method.name in _MAY_WAIT else _DEADLINE_SECONDS
    try:
        if down:
            async for response in call(iter(messages) if up else messages[0], timeout=deadline):
                if method is _PIPELINE and (unclear := _unclear_failure(response)) is not None:
                    return unclear
        else:
            await call(messages[0], timeout=deadline)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def _leave_unread(channel: grpc.aio.Channel, messages: list[bytes]) -> None:
    """Send to a pipeline, and go away without having read anything."""
    call: Any = channel.stream_stream(f"/{_SERVICE.full_name}/{_PIPELINE.name}")(timeout=_DEADLINE_SECONDS)
    try:
        for message in messages:
            await call.write(message)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the server has ended it, as it may
    finally:
        call.cancel()


def _unclear_failure(response: bytes) -> tuple[grpc.StatusCode, str] | None:
    """One of the failures in a message of a pipeline, if any is unclear."""
    for outcome in pb.PipelineResponse.FromString(response).outcomes:
        status, message = _STATUSES[outcome.failure.status_code], outcome.failure.message
        if not _is_clear(status, message):
            return status, f"in a pipeline: {message}"
    return None


_STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}
_FAULTS = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


def _is_clear(status: grpc.StatusCode, message: str) -> bool:
    """Whether a caller can tell from it what was wrong: nothing went wrong within the server, and no code shows."""
    if status in _FAULTS:
        return False
    return "Traceback" not in message and (status is grpc.StatusCode.OK or bool(message))


@asynccontextmanager
async def _all_of() -> AsyncIterator[Callable[[Any], None]]:
    """Starts coroutines, and waits for all of them at the end."""
    tasks: set[asyncio.Task[None]] = set()

    def start(coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    yield start
    while tasks:
        await asyncio.gather(*tasks)
