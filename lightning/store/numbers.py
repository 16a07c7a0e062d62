"""Checking numbers that callers hand in. It stands alone, so that the contract's own defaults can use it too."""

from __future__ import annotations

import math


def check_count(value: int, name: str, least: int) -> None:
    """Raises `ValueError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_time(value: float | None, name: str) -> float | None:
    """A moment. Raises `ValueError` unless it is None or a finite number of seconds since the epoch."""
    if value is not None and not (_is_number(value) and math.isfinite(value)):
        raise ValueError(f"{name} must be seconds since the epoch or None, not {value!r}")
    return value


def check_revision(value: int | None) -> None:
    """Raises `ValueError` unless `value` is None or may be a revision that the store has told."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"after_revision must be a revision that the store has told, or None, not {value!r}")


def check_wait(timeout: float | None) -> float | None:
    """A time to wait, None if endless. Raises `ValueError` unless it is None or a number of seconds, 0 or more."""
    if timeout is None:
        return None
    if not _is_number(timeout) or not timeout >= 0:
        raise ValueError(f"timeout must be None or a number of seconds, 0 or more, not {timeout!r}")
    return None if math.isinf(timeout) else float(timeout)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
