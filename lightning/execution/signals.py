"""Ctrl-C and SIGTERM while a job runs: asked once, the job ends in order; asked twice, at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_READ_SIZE_BYTES = 512


class SignalWatch:
    """While entered, takes the signals that would end the program.

    Only in the main thread, as Python has it; and a signal that the program ignores stays ignored (`nohup`, or a
    script's background jobs).

    Python runs handlers in the main thread, between two instructions: never, while that thread hangs in a call. So
    each signal is also noted in a pipe, from which another thread can learn it (`fileno`, `read`).

    Args:
        heed: Called in the main thread after a signal, between any two instructions; may raise `KeyboardInterrupt`.
            It is told whether the signal is one of `interrupt`.
    """

    def __init__(self, heed: Callable[[bool], None]) -> None:
        self._heed = heed
        self._previous: dict[int, Any] = {}
        self._previous_pipe = -1
        self._pipe: tuple[int, int] | None = None
        self._handled: list[int] = []
        self._noted: list[int] = []
        self._interrupting = False
        self._unread_interrupts = 0

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in WATCHED_SIGNALS}
            # None: set from C, and could not be put back
            self._previous = {
                n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)
            }
        if self._previous:
            self._pipe = os.pipe()
            for fd in self._pipe:
                os.set_blocking(fd, False)
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in self._previous:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        signal.set_wakeup_fd(self._previous_pipe)
        for fd in self._pipe:
            os.close(fd)

    @property
    def active(self) -> bool:
        """Whether signals come here, that is, whether this is the main thread's watch."""
        return bool(self._previous)

    @property
    def signals(self) -> list[int]:
        """Those that came so far, oldest first."""
        # the program may have put another pipe in place of ours, so neither list is sure to have them all
        return max(self._handled, self._noted, key=len)

    def fileno(self) -> int:
        """Is readable when a signal has come. Only while the watch is `active`."""
        assert self._pipe is not None
        return self._pipe[0]

    def read(self) -> None:
        """Take what is in the pipe into account, in any one thread."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.fileno(), _READ_SIZE_BYTES)
            for number in data:
                if number == signal.SIGINT and self._unread_interrupts:
                    self._unread_interrupts -= 1
                elif number in self._previous:
                    self._noted.append(number)
            if self._previous_pipe != -1:
                os.write(self._previous_pipe, data)

    def interrupt(self) -> None:
        """From another thread: interrupt what blocks the main thread, as Ctrl-C does, without counting as one."""
        self._interrupting = True
        self._unread_interrupts += 1
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def resume(self) -> None:
        """After the watch: let the first signal take the course that it would have taken without it.

        Raises:
            KeyboardInterrupt: By SIGINT, unless the program has another handler.
            SystemExit: By SIGTERM, unless the program has a handler: the conventional code, but with all clean-up.
        """
        number = self.signals[0]
        if callable(self._previous[number]):
            signal.raise_signal(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        own, self._interrupting = self._interrupting, False
        if not own:
            self._handled.append(number)
        self._heed(own)
