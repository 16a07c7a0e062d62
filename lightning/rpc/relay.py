"""A way out for forked processes, in which gRPC is dead: a process of their own that speaks it for them.

gRPC's core runs threads, which a fork does not copy; if it was in use at that moment, nothing that the child asks of it
ever ends. So the child starts a fresh interpreter with a `Connection` in it, and sends calls to it by a pipe. It ends
when the pipe does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import IO, Any, TypeVar

from lightning.rpc.address import Endpoint
from lightning.rpc.errors import StoreUnavailableError
from lightning.rpc.options import ClientOptions
from lightning.store.threaded import LoopThread
from lightning.types import RolloutEvent, WorkerCommand

T = TypeVar("T")

_LENGTH = struct.Struct("!Q")
_EXIT_TIMEOUT_SECONDS = 10.0


class RelayedConnection:
    """As `Connection`, for a process that was forked while gRPC was in use.

    Args:
        endpoint: The server.
        options: The client's.
    """

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        self.pid = os.getpid()
        self._endpoint = endpoint
        self._numbers = itertools.count()
        self._pending: dict[int, Future[Any]] = {}
        self._write_lock = threading.Lock()
        self._ended: Exception | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from lightning.rpc.relay import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        self._answers = self._process.stdout
        self._reader = threading.Thread(target=self._read_answers, name="lightning-relay", daemon=True)
        self._reader.start()
        write_frame(self._requests, (endpoint, options))

    async def unary(self, method: str, request: bytes, timeout: float) -> bytes:
        """See `Connection.unary`."""
        response: bytes = await self._call("unary", method, request, timeout)
        return response

    async def collect(self, method: str, request: bytes, take: Callable[[bytes], T]) -> list[T]:
        """See `Connection.collect`."""
        return [take(response) for response in await self._call("collect", method, request)]

    async def receive_commands(
        self, worker_id: str, instance_id: str | None, timeout: float | None
    ) -> Sequence[WorkerCommand]:
        """See `Connection.receive_commands`."""
        commands: Sequence[WorkerCommand] = await self._call(
            "receive_commands", worker_id, instance_id, timeout
        )
        return commands

    async def deliver_spans(self, spans: Sequence[bytes]) -> int:
        """See `Connection.deliver_spans`."""
        stored: int = await self._call("deliver_spans", spans)
        return stored

    async def open_watch(self, rollout_ids: Sequence[str], after_revision: int | None) -> int:
        """See `Connection.open_watch`."""
        key: int = await self._call("open_watch", rollout_ids, after_revision)
        return key

    async def next_event(self, key: int) -> RolloutEvent | None:
        """See `Connection.next_event`."""
        event: RolloutEvent | None = await self._call("next_event", key)
        return event

    async def close_watch(self, key: int) -> None:
        """See `Connection.close_watch`."""
        await self._call("close_watch", key)

    @property
    def closed(self) -> bool:
        """See `Connection.closed`."""
        return self._ended is not None

    async def wait_until_ready(self, timeout: float | None) -> None:
        """See `Connection.wait_until_ready`."""
        await self._call("wait_until_ready", timeout)

    async def close(self) -> None:
        """End the process; calls in flight fail. To be called once."""
        self._end(RuntimeError(f"the client of {self._endpoint} was closed"))
        await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_SECONDS)
        await asyncio.to_thread(self._reader.join, _EXIT_TIMEOUT_SECONDS)

    def abandon(self) -> None:
        """`close`, without waiting."""
        if self.pid == os.getpid():
            self._end(RuntimeError(f"the client of {self._endpoint} was closed"))

    async def _call(self, action: str, *arguments: Any) -> Any:
        number = next(self._numbers)
        answer: Future[Any] = Future()
        self._pending[number] = answer
        self._send((number, action, arguments))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            if self._pending.pop(number, None) is not None:
                self._send((number, "cancel", ()))
            raise

    def _send(self, frame: Any) -> None:
        with self._write_lock:
            if self._ended is None:
                with suppress(OSError):  # it died: the reader sees that as well, and fails what is pending
                    write_frame(self._requests, frame)
                    return
        self._fail_pending()

    def _read_answers(self) -> None:
        # takes no lock, for it must go on reading while a large request is being written
        with suppress(OSError):
            while (frame := read_frame(self._answers)) is not None:
                number, result, error = frame
                answer = self._pending.pop(number, None)
                if answer is None or not answer.set_running_or_notify_cancel():
                    continue
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
        self._answers.close()
        self._end(StoreUnavailableError("the process that speaks gRPC for this forked one has died"))

    def _end(self, error: Exception) -> None:
        with self._write_lock:
            if self._ended is None:
                self._ended = error
                with suppress(OSError):  # what could not be written is lost with the process
                    self._requests.close()
        self._fail_pending()

    def _fail_pending(self) -> None:
        while self._pending and self._ended is not None:
            _, answer = self._pending.popitem()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(self._ended)


def main() -> None:
    """Make the calls that come in by standard input, until it ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not get between the answers
    endpoint, options = read_frame(requests)
    thread = LoopThread("lightning-relay")
    thread.run_blocking(_Relay(endpoint, options, answers).run(requests))
    thread.stop()


class _Relay:
    """The other end of the pipe."""

    def __init__(self, endpoint: Endpoint, options: ClientOptions, answers: IO[bytes]) -> None:
        from lightning.rpc.connection import Connection

        self._connection = Connection(endpoint, options)
        self._answers = answers
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self, requests: IO[bytes]) -> None:
        """Read and make calls."""
        while (frame := await asyncio.to_thread(read_frame, requests)) is not None:
            number, action, arguments = frame
            if action == "cancel":
                if number in self._tasks:
                    self._tasks[number].cancel()
                continue
            task = asyncio.ensure_future(self._answer(number, self._make(action, *arguments)))
            self._tasks[number] = task
            task.add_done_callback(lambda _, number=number: self._tasks.pop(number))  # type: ignore[misc]
        await self._connection.close()

    async def _make(self, action: str, *arguments: Any) -> Any:
        if action == "collect":
            method, request = arguments
            return await self._connection.collect(method, request, bytes)
        return await getattr(self._connection, action)(*arguments)

    async def _answer(self, number: int, call: Coroutine[Any, Any, Any]) -> None:
        try:
            frame: tuple[int, Any, Exception | None] = (number, await call, None)
        except Exception as error:  # noqa: BLE001  # the caller hears of it
            frame = (number, None, error)
        write_frame(self._answers, frame)


def write_frame(pipe: IO[bytes], frame: Any) -> None:
    """Send a value. Each end trusts the other, for one started the other."""
    data = pickle.dumps(frame)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Any:
    """The next value; None at the end."""
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = pipe.read(length)
    return pickle.loads(data) if len(data) == length else None
