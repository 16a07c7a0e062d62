"""The stores people construct: the engine over each backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from lightning.store.clock import Clock, SystemClock
from lightning.store.engine import StoreEngine
from lightning.store.persistence.memory import MemoryPersistence
from lightning.store.persistence.sqlite import SQLitePersistence
from lightning.store.persistence.sqlite_file import Durability
from lightning.store.records import SpanRecord
from lightning.store.retention import Retention
from lightning.types import Span

_DEFAULT_EVICTION_FRACTION = 0.7
_DEFAULT_SAFE_FRACTION = 0.8

MemoryAmount = int | float
"""Bytes (an int, or a float above 1), or a fraction (a float of at most 1)."""


SpanSizeEstimator = Callable[[Span], int]
"""Bytes that a span counts as."""


class InMemoryLightningStore(StoreEngine):
    """A store in the memory of this process: for tests, notebooks, and speed.

    Args:
        thread_safe: Accepted for the peer's sake; this store always is.
        eviction_memory_threshold: Span memory above which spans of finished rollouts are dropped, oldest first: bytes,
            or a fraction of the machine's memory. Default: 0.7 of it.
        safe_memory_threshold: How far down an eviction goes: bytes, or a fraction of the eviction threshold.
            Default: 0.8 of it.
        span_size_estimator: Says how many bytes a span counts as. Each span is decoded for it, which costs time; by
            default what a span really occupies is counted, without decoding it.
        validate_resources: See `StoreEngine`.
        clock: See `StoreEngine`.

    Raises:
        ValueError: A threshold is not positive, or the safe one is above the other.
    """

    def __init__(
        self,
        *,
        thread_safe: bool = True,
        eviction_memory_threshold: MemoryAmount | None = None,
        safe_memory_threshold: MemoryAmount | None = None,
        span_size_estimator: SpanSizeEstimator | None = None,
        validate_resources: bool = True,
        clock: Clock | None = None,
    ) -> None:
        capacity = psutil.virtual_memory().total
        eviction = _bytes(
            _DEFAULT_EVICTION_FRACTION if eviction_memory_threshold is None else eviction_memory_threshold,
            capacity,
            "eviction_memory_threshold",
        )
        safe = _bytes(
            _DEFAULT_SAFE_FRACTION if safe_memory_threshold is None else safe_memory_threshold,
            eviction,
            "safe_memory_threshold",
        )
        if safe > eviction:
            raise ValueError(
                f"safe_memory_threshold ({safe} bytes) is above the eviction threshold ({eviction} bytes)"
            )
        persistence = MemoryPersistence(
            eviction_threshold_bytes=eviction,
            safe_threshold_bytes=safe,
            capacity_bytes=capacity,
            span_bytes=None if span_size_estimator is None else _by_span(span_size_estimator),
        )
        super().__init__(persistence, clock=clock, validate_resources=validate_resources)


class SQLiteLightningStore(StoreEngine):
    """A store in one SQLite file: no server to run, and what it acknowledged survives `kill -9` and power failures.

    The file is opened by the first call, or by `open`; what is in the way then raises `BackendOpenError`: another store
    that has it open, a file that is no database or of a newer version, a place that cannot be written or is on a
    network. A call that cannot be written for want of room raises `BackendFullError`, and changes nothing.

    Args:
        path: The file, made if there is none; `":memory:"` keeps everything in memory.
        durability: What a power failure may take: with `"full"` nothing that was acknowledged, with `"normal"`, which
            is faster, the last moments before it.
        retain: What is kept of rollouts that have finished, and of their spans: `"7d"` (units: s, m, h, d, w), those
            that ended within the last 7 days; `"10GB"` (KB, MB, GB, TB, KiB, …), as many as fit, those that ended first
            going first; or both. Default: all.
        validate_resources: See `StoreEngine`.
        clock: See `StoreEngine`.

    Raises:
        ValueError: Another `durability`, or no such amount to `retain`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Durability = "full",
        retain: str | Sequence[str] | None = None,
        validate_resources: bool = True,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or SystemClock()
        retention = None if retain is None else Retention.of(retain)
        persistence = SQLitePersistence(path, durability=durability, retention=retention, now=clock.now)
        super().__init__(persistence, clock=clock, validate_resources=validate_resources)


def _by_span(estimate: SpanSizeEstimator) -> Callable[[SpanRecord], int]:
    def size(record: SpanRecord) -> int:
        value = estimate(record.to_span())
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"span_size_estimator must return a number of bytes, 0 or more, not {value!r}")
        return value

    return size


def _bytes(amount: MemoryAmount, whole: int, name: str) -> int:
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
        raise ValueError(f"{name} must be a positive number of bytes or a fraction, not {amount!r}")
    return int(amount * whole) if isinstance(amount, float) and amount <= 1.0 else int(amount)
