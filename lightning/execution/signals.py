"""Ctrl-C and SIGTERM while a job runs: asked once, the job ends in order; asked twice, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalWatch:
    """While entered, hands signals that would end the program to `heed` instead.

    Only in the main thread, as Python has it; and a signal that the program ignores stays ignored (`nohup`, or a
    script's background jobs).

    Args:
        heed: Called in the main thread with the signal's number, between any two instructions.
    """

    def __init__(self, heed: Callable[[int], None]) -> None:
        self._heed = heed
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED_SIGNALS:
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):  # None: set from C, and could not be put back
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    @property
    def active(self) -> bool:
        """Whether signals come here, that is, whether this is the main thread's watch."""
        return bool(self._previous)

    def resume(self, number: int) -> None:
        """After the watch: let a signal that was heeded take the course that it would have taken without it.

        Raises:
            KeyboardInterrupt: By SIGINT, unless the program has another handler.
            SystemExit: By SIGTERM, unless the program has a handler: the conventional code, but with all clean-up.
        """
        if callable(self._previous[number]):
            signal.raise_signal(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heed(number)
