"""The child's side of a child process: takes over its task, does it, says how it went, and dies with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import cloudpickle

_EXIT_GRACE_SECONDS = 5.0
"""How long threads that the task left behind may keep its process alive."""
_PR_SET_PDEATHSIG = 1

Entry = Callable[["ParentLink"], Awaitable[None]]
"""What a child process does."""


# --- What a child tells its parent -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The child has its task and everything this needed to be imported, and begins."""


@dataclass(frozen=True)
class Report:
    """Something that the task has to say, such as where its server listens."""

    value: Any


@dataclass(frozen=True)
class Finished:
    """The task came to its end."""


@dataclass(frozen=True)
class Failed:
    """The task, or loading it, raised an exception."""

    summary: str
    """Type and message, one line."""
    trace: str
    pickled: bytes | None
    """The exception itself, where it can be pickled."""
    loading: bool

    @classmethod
    def of(cls, error: BaseException, *, loading: bool = False) -> Failed:
        """Describe `error`."""
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        try:
            pickled = cloudpickle.dumps(error)
            pickle.loads(pickled)  # many exceptions can be dumped and not loaded
        except Exception:  # noqa: BLE001 - whatever its own code does; then its text has to do
            pickled = None
        return cls(summary, "".join(traceback.format_exception(error)), pickled, loading)


# --- The link --------------------------------------------------------------------------------------------------------


class ParentLink:
    """The channel to the parent. The parent is the only one at its other end: when that closes, the parent is dead."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._channel: Connection[Any, Any] = Connection(fd)
        self._task: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        threading.Thread(target=self._read, name="lightning-parent", daemon=True).start()

    def take_task(self) -> bytes:
        """The task, as the parent pickled it. Blocks; to be called once, first."""
        return self._task.get()

    def send(self, message: Loaded | Report | Finished | Failed) -> None:
        """Tell the parent."""
        with contextlib.suppress(OSError):  # it is dead, and so are we in a moment
            self._channel.send(message)

    def report(self, value: Any) -> None:
        """Tell the parent something that is particular to the task."""
        self.send(Report(value))

    def attach(self) -> None:
        """Receive messages on the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> Any:
        """The parent's next message."""
        return await self._messages.get()

    def _read(self) -> None:
        try:
            self._task.put(self._channel.recv_bytes())
            while True:
                message = self._channel.recv()
                assert self._loop is not None  # the parent speaks after `Loaded`, which comes after `attach`
                self._loop.call_soon_threadsafe(self._messages.put_nowait, message)
        except (EOFError, OSError):
            perish()


def perish() -> NoReturn:
    """Die at once, with everything that this process has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _die_with_parent(lifeline: int, parent_pid: int) -> None:
    """See to it that nothing of this process is left when the parent is, even if a call that never returns holds the
    interpreter: a shell in this process's group waits for the lifeline to close, and then kills the group. Where the
    kernel can, it kills this process too, and does not depend on who else may have inherited the lifeline."""
    with contextlib.suppress(FileNotFoundError):  # no shell, as in the smallest containers
        subprocess.Popen(["/bin/sh", "-c", "read -r _; kill -9 0"], stdin=lifeline)
    os.close(lifeline)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # died before we asked
        perish()


# --- The life of a child ---------------------------------------------------------------------------------------------


def main(channel: int, lifeline: int, parent_pid: int) -> NoReturn:
    """Take the task from a channel, do it, and exit with 0, or with 1 if it failed.

    Args:
        channel: File descriptor of a connection to the parent.
        lifeline: File descriptor of a pipe to which only the parent holds the other end.
        parent_pid: The parent's process id.
    """
    _die_with_parent(lifeline, parent_pid)
    link = ParentLink(channel)
    try:
        sys.argv, pickled = pickle.loads(link.take_task())
        entry: Entry = pickle.loads(pickled)
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        link.send(Failed.of(error, loading=True))
        sys.exit(1)
    sys.exit(asyncio.run(_work(entry, link)))


async def _work(entry: Entry, link: ParentLink) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    link.attach()
    link.send(Loaded())
    code = 0
    try:
        await entry(link)
    except asyncio.CancelledError:
        pass  # by SIGINT, as told
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001 - the parent raises or logs it
        link.send(Failed.of(error))
        code = 1
    else:
        link.send(Finished())
    _exit_soon(code)
    return code


def _exit_soon(code: int) -> None:
    """Threads that hang, such as an agent's in a call that never returns, must not keep a finished process alive."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(_EXIT_GRACE_SECONDS, leave)
    timer.daemon = True
    timer.start()
