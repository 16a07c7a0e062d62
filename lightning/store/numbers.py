"""Checking numbers that callers hand in. It stands alone, so that the contract's own defaults can use it too."""

from __future__ import annotations

import math

MAX_COUNT = 2**63 - 1
"""Larger numbers of things neither the wire nor every backend takes."""


def is_count(value: object, least: int) -> bool:
    """Whether `value` is a number of things, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT


def check_count(value: int, name: str, least: int) -> None:
    """Raises `ValueError` unless `value` is a whole number of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_time(value: float | None, name: str) -> float | None:
    """A moment. Raises `ValueError` unless it is None or a finite number of seconds since the epoch."""
    if value is not None and not math.isfinite(_number(value)):
        raise ValueError(f"{name} must be seconds since the epoch or None, not {value!r}")
    return value


def check_revision(value: int | None) -> None:
    """Raises `ValueError` unless `value` is None or may be a revision that the store has told."""
    if value is not None and not is_count(value, least=0):
        raise ValueError(f"after_revision must be a revision that the store has told, or None, not {value!r}")


def check_version(value: int | None) -> None:
    """Raises `ValueError` unless `value` is None or may be a version of resources."""
    if value is not None and not is_count(value, least=0):
        raise ValueError(f"version must be None or a whole number, not {value!r}")


def check_wait(timeout: float | None) -> float | None:
    """A time to wait, None if endless. Raises `ValueError` unless it is None or a number of seconds, 0 or more."""
    if timeout is None:
        return None
    seconds = _number(timeout)
    if not seconds >= 0:
        raise ValueError(f"timeout must be None or a number of seconds, 0 or more, not {timeout!r}")
    return None if math.isinf(seconds) else seconds


def _number(value: object) -> float:
    """`value` as a float; NaN if it is no number, or infinite if it is too large a one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
