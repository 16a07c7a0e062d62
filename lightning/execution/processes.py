"""Child processes: started clean, watched, told to stop step by step, and never left behind.

Each has a session of its own, so that a Ctrl-C in the terminal reaches the parent only, which then decides, and so
that what a child started goes with it. Nothing is forked: a child is a fresh interpreter, for gRPC and `fork` do not
mix. It gets its task through a channel, pickled by value where it was defined in a script or a notebook, so the
program's main module is not imported again.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import ChainMap
from collections.abc import Callable, Collection, Sequence
from multiprocessing import Pipe, context, reduction, spawn, util
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, cast

import cloudpickle

from lightning.execution import launch
from lightning.execution.base import ExecutionError
from lightning.execution.child import Entry, Failed, Finished, Loaded, Report
from lightning.execution.job import Job

_MAIN_OF_MULTIPROCESSING = "__mp_main__"
"""What a process of `multiprocessing` calls the program's main module."""


class Payload:
    """A task, pickled once for any number of children.

    Events, queues and pipes of `multiprocessing` within it reach the children as they would in a `Process`.

    Args:
        entry: What the child does.
        what: Names the task in errors.

    Raises:
        TypeError: Something in it cannot be pickled.
    """

    def __init__(self, entry: Entry, what: str) -> None:
        if (
            _MAIN_OF_MULTIPROCESSING in sys.modules
        ):  # we are such a process, and a child cannot import it any more than
            cloudpickle.register_pickle_by_value(
                sys.modules[_MAIN_OF_MULTIPROCESSING]
            )  # it can a program's `__main__`
        inheritance, buffer = _Inheritance(), io.BytesIO()
        context.set_spawning_popen(cast(Any, inheritance))
        try:
            _Pickler(buffer).dump(entry)
        except Exception as error:
            raise TypeError(f"{what} cannot be sent to another process: {error}") from error
        finally:
            context.set_spawning_popen(None)
        self.data = pickle.dumps((sys.argv, buffer.getvalue()))
        self.fds: Sequence[int] = inheritance.fds
        self._entry = entry  # keeps the file descriptors open


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    """As cloudpickle does, and with the name of the file, which it leaves out since 3.1.3: without it, no traceback
    could show the line where something happened."""
    rebuild, parts = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return _rebuild_code, (rebuild, parts, code.co_filename)


def _rebuild_code(rebuild: Callable[..., CodeType], parts: tuple[Any, ...], file_name: str) -> CodeType:
    return rebuild(*parts).replace(co_filename=file_name)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles by value what is defined in a script, a notebook or a function, and, as an own `Process` would get them,
    the connections and sockets that the task refers to."""

    dispatch_table: ClassVar[Any] = ChainMap(
        {CodeType: _reduce_code},
        cloudpickle.Pickler.dispatch_table,
        reduction.ForkingPickler(io.BytesIO()).dispatch_table,
    )


class _Inheritance:
    """Stands for the process being started while its task is pickled; collects the file descriptors it needs."""

    method = "spawn"

    class DupFd:
        def __init__(self, fd: int) -> None:
            self._fd = fd

        def detach(self) -> int:
            return self._fd

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        self.fds.append(fd)
        return fd


class ChildProcess:
    """A running child. To be made and used on one event loop, in a thread that outlives the child.

    Args:
        name: Names it, in errors and in the process list.
        payload: What it does.
        environment: Environment variables beside the parent's own.
    """

    def __init__(self, name: str, payload: Payload, environment: dict[str, str] | None = None) -> None:
        self.name = name
        loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[None] = loop.create_future()
        """Done when it has begun."""
        self.reported: asyncio.Future[Any] = loop.create_future()
        """What the task reported first."""
        self.exited: asyncio.Future[int] = loop.create_future()
        """Its exit code, negative for the signal that killed it. Done when it, and all that it started, is gone."""
        self.finished = False
        """Whether its task came to an end."""
        self.failed: Failed | None = None
        """What its task raised."""
        self.killed = False
        """Whether it had to be killed, because it did not heed anything else."""
        self._loop = loop
        self._lock = threading.Lock()
        self._reaped = False
        ours, theirs = Pipe()
        lifeline, self._lifeline = Pipe(duplex=False)
        try:
            with theirs, lifeline:
                own = (theirs.fileno(), lifeline.fileno())
                self._process = _start(name, own, payload.fds, environment or {})
        except BaseException:
            ours.close()
            self._lifeline.close()
            raise
        self._channel = ours
        loop.add_reader(ours.fileno(), self._read)
        tend = threading.Thread(
            target=self._tend, args=(payload.data,), name=f"lightning-{name}", daemon=True
        )
        tend.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Tell it something; only after it has `loaded`."""
        with contextlib.suppress(OSError):  # it has just died, which `exited` says
            self._channel.send(message)

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with self._lock:
            if not self._reaped:
                os.kill(self.pid, number)

    def describe_end(self) -> str:
        """How it ended, for people."""
        assert self.exited.done()
        text = f"the {self.name} process {describe_exit(self.exited.result())}"
        return f"{text}: {self.failed.summary}" if self.failed else text

    def error(self) -> BaseException:
        """The exception that its task raised, with the child's traceback as its cause; else an `ExecutionError`."""
        if self.failed is None:
            return ExecutionError(self.describe_end())
        cause = ChildTraceback(self.name, self.failed.trace)
        error: BaseException = ExecutionError(f"the {self.name} process failed: {self.failed.summary}")
        if self.failed.pickled is not None:
            error = pickle.loads(self.failed.pickled)
        error.__cause__ = cause
        return error

    def _read(self) -> None:
        try:
            while self._channel.poll():
                self._take(self._channel.recv())
        except (EOFError, OSError):
            self._loop.remove_reader(self._channel.fileno())

    def _take(self, message: Loaded | Report | Finished | Failed) -> None:
        if isinstance(message, Loaded):
            self.loaded.set_result(None)
        elif isinstance(message, Report):
            self.reported.set_result(message.value)
        elif isinstance(message, Finished):
            self.finished = True
        else:
            self.failed = message

    def _tend(self, data: bytes) -> None:
        """In a thread of its own: hand over the task, which may be large, and wait for the end."""
        with contextlib.suppress(OSError):
            self._channel.send_bytes(data)
        if hasattr(os, "waitid"):  # while it is a zombie still, no other process group can have its number
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._reaped = True
        with contextlib.suppress(ProcessLookupError, PermissionError):  # there is nothing left of it
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._loop.call_soon_threadsafe(self._gone, code)

    def _gone(self, code: int) -> None:
        self._read()
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._lifeline.close()
        self.exited.set_result(code)


class ChildTraceback(Exception):
    """Stands as the cause of an exception that was raised in a child process, and shows where."""

    def __init__(self, name: str, trace: str) -> None:
        super().__init__(name, trace)
        self.name = name
        self.trace = trace

    def __str__(self) -> str:
        return f"in the {self.name} process\n{self.trace}"


def describe_exit(code: int) -> str:
    """Say what an exit code means."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _start(
    name: str, own: Sequence[int], inherited: Sequence[int], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    flags = cast("Callable[[], list[str]]", vars(util)["_args_from_interpreter_flags"])()
    script = str(Path(launch.__file__).resolve())
    search_path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))
    return subprocess.Popen(
        [os.fsdecode(spawn.get_executable()), *flags, script, name, *map(str, own), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        pass_fds=(*own, *inherited),
        start_new_session=True,
        env={**os.environ, **environment, launch.SEARCH_PATH_VARIABLE: search_path},
    )


async def stop_children(job: Job, children: Collection[ChildProcess], *, wait_first: bool = True) -> None:
    """See to it that these processes end: wait, SIGINT, SIGTERM, SIGKILL; returns when all are gone.

    Args:
        job: Has the timeouts, and knows when it is urgent: then they are killed at once.
        children: They have been asked to come to an end already.
        wait_first: False goes straight to SIGTERM: waiting would be in vain.
    """
    gone = asyncio.ensure_future(_all_gone(children))
    steps = [(None, job.graceful_timeout), (signal.SIGINT, job.graceful_timeout)] if wait_first else []
    for number, timeout in [*steps, (signal.SIGTERM, job.terminate_timeout)]:
        if job.urgent.is_set():
            break
        if number is not None:
            for child in children:
                child.signal(number)
        if await job.pause(gone, timeout):
            return
    for child in children:
        if not child.exited.done():
            child.killed = True
            child.signal(signal.SIGKILL)
    await gone


async def _all_gone(children: Collection[ChildProcess]) -> None:
    if children:
        await asyncio.wait({child.exited for child in children})
