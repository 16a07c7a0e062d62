"""Files that are read again when they change."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

Stamp = tuple[tuple[int, int, int], ...]
"""What tells one state of some files from another."""


def stamp(paths: Iterable[str]) -> Stamp | None:
    """What is different once one of these files has changed; None while one of them is not there."""
    try:
        states = [os.stat(path) for path in paths]  # noqa: PTH116  # on the way of every call
    except OSError:
        return None
    return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)


class Followed(Generic[T]):
    """What some files hold, at any time. Safe to use from many threads.

    Args:
        paths: The files.
        read: Reads them, and raises `ValueError` if they are of no use. Then that is logged, and what they held before
            stays in force.

    Raises:
        ValueError: They are of no use now.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._stamp = stamp(self._paths)
        self._value = read()

    def value(self) -> T:
        """What they hold; the same object as long as they do not change."""
        if stamp(self._paths) != self._stamp:
            self._read_again()
        return self._value

    def _read_again(self) -> None:
        with self._lock:
            now = stamp(self._paths)
            if now == self._stamp:
                return
            try:
                self._value = self._read()
            except ValueError as error:
                logger.error("what was read before stays in force: %s", error)
            else:
                logger.info("read %s again", ", ".join(self._paths))
            self._stamp = now
