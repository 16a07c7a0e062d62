"""What queries return: a page of items that also knows how many there are in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from typing_extensions import TypedDict

from lightning.types.record import Record

T = TypeVar("T")


class PaginatedResult(Record, Sequence[T], Generic[T]):
    """A page of results that reads like a list: iterate, index, `len()`."""

    items: list[T]
    limit: int
    """The limit asked for; -1: none."""
    offset: int
    """How many matches were skipped before the first item."""
    total: int
    """How many items match in all, on this page or not."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]  # pydantic would iterate over fields
        return iter(self.items)

    def __contains__(self, item: Any) -> bool:
        return item in self.items


class LightningStoreCapabilities(TypedDict):
    """What a store can do."""

    thread_safe: bool
    """May be called from several threads and event loops."""
    async_safe: bool
    """May be called by several coroutines at once."""
    zero_copy: bool
    """Several processes may hold the same store without a server between them."""
    otlp_traces: bool
    """Takes OpenTelemetry traces over OTLP."""


class LightningStoreStatistics(TypedDict, total=False):
    """Counts and sizes of a store. Optional keys are absent where a store does not know them."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    """Versions of resources, over all ids."""
    total_workers: int
    rollouts_by_status: dict[str, int]
    attempts_by_status: dict[str, int]
    """Absent while there are none, as `expired_attempts` is."""
    oldest_queued_age: float
    """Seconds that the rollout at the head of the queue has been waiting, since it was created or its last attempt
    ended; absent while the queue is empty."""
    expired_attempts: dict[str, int]
    """How many attempts the watchdog of this store has closed since it was opened, by the status that it gave them."""
    uptime: float
    """Seconds since the store was opened."""
    total_span_bytes: int
    evicted_spans: int
    """How many spans were dropped to save room."""
    dropped_rollouts: int
    """How many finished rollouts were dropped, as what is kept of them is limited."""
    eviction_threshold_bytes: int
    safe_threshold_bytes: int
    memory_capacity_bytes: int
