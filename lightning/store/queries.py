"""Queries: checked once, here; and what they select, for whatever has to be filtered, sorted or cut in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning.store.contract import FilterLogic, SortOrder
from lightning.store.numbers import check_wait as check_wait
from lightning.store.numbers import is_count
from lightning.store.records import RolloutRecord, SpanRecord
from lightning.store.texts import as_list, check_text
from lightning.types import PaginatedResult

if TYPE_CHECKING:
    from lightningpb.v1 import span_pb2

T = TypeVar("T")

ROLLOUT_SORT_FIELDS = ("rollout_id", "start_time", "end_time", "mode", "resources_id", "status")
ATTEMPT_SORT_FIELDS = (
    "attempt_id",
    "sequence_id",
    "start_time",
    "end_time",
    "status",
    "worker_id",
    "last_heartbeat_time",
)
_OPTIONAL_SPAN_FIELDS = frozenset({"parent_id", "start_time", "end_time"})
_CONTAINS = "_contains"
SPAN_SORT_FIELDS = (
    "sequence_id",
    "trace_id",
    "span_id",
    "parent_id",
    "name",
    "start_time",
    "end_time",
    "attempt_id",
)
RESOURCES_SORT_FIELDS = ("resources_id", "version", "create_time", "update_time")
WORKER_SORT_FIELDS = (
    "worker_id",
    "status",
    "last_heartbeat_time",
    "last_dequeue_time",
    "last_busy_time",
    "last_idle_time",
    "current_rollout_id",
    "current_attempt_id",
)


@dataclass(frozen=True)
class Page:
    """How to order what a query finds, and which part of it to return."""

    sort_by: str | None
    descending: bool
    limit: int
    offset: int

    @classmethod
    def of(
        cls, sort_by: str | None, sort_order: SortOrder, limit: int, offset: int, fields: Sequence[str]
    ) -> Page:
        """Check the parameters of a query.

        Raises:
            ValueError: A value that means nothing, with those that do.
            TypeError: `sort_by` is no string.
        """
        check_page(sort_by, sort_order, limit, offset)
        if sort_by is not None and sort_by not in fields:
            raise ValueError(f"cannot sort by {sort_by!r}; choose one of {', '.join(fields)}")
        return cls(sort_by, sort_order == "desc", limit, offset)

    def cut(self, items: Sequence[T]) -> list[T]:
        """The part of the ordered `items` that is on this page."""
        return list(items[self.offset :] if self.limit < 0 else items[self.offset : self.offset + self.limit])

    def order(self, items: Iterable[T]) -> list[T]:
        """`items` in the order of this page; equal ones stay in the order in which they come."""
        ordered = list(items)
        if self.sort_by is None:
            if self.descending:
                ordered.reverse()
            return ordered
        field = self.sort_by
        ordered.sort(key=lambda item: sort_key(getattr(item, field)), reverse=self.descending)
        return ordered

    def result(self, items: Iterable[T]) -> PaginatedResult[T]:
        """Order all matches and cut the page out of them."""
        ordered = self.order(items)
        return self.paginated(self.cut(ordered), len(ordered))

    def paginated(self, items: list[T], total: int) -> PaginatedResult[T]:
        """Wrap what is on the page already."""
        return PaginatedResult.model_construct(items=items, limit=self.limit, offset=self.offset, total=total)


def check_page(sort_by: str | None, sort_order: SortOrder, limit: int, offset: int) -> None:
    """What of a page needs no knowledge of the fields there are. Raises `ValueError` for what means nothing, and
    `TypeError` if `sort_by` is no string."""
    check_texts(sort_by=sort_by)
    if sort_order not in ("asc", "desc"):
        raise ValueError(f"sort_order must be 'asc' or 'desc', not {sort_order!r}")
    if not is_count(limit, least=-1):
        raise ValueError(f"limit must be -1 (no limit) or a number of items, not {limit!r}")
    if not is_count(offset, least=0):
        raise ValueError(f"offset must be a number of items to skip, not {offset!r}")


def sort_key(value: Any) -> tuple[bool, Any]:
    """Missing values sort first."""
    return (value is not None, value)


@dataclass(frozen=True)
class Filters(Generic[T]):
    """Conditions that must all hold, or one of them. Without any, everything matches."""

    conditions: tuple[Callable[[T], bool], ...]
    any_suffices: bool

    @classmethod
    def of(cls, conditions: Iterable[Callable[[T], bool]], filter_logic: FilterLogic) -> Filters[T]:
        """Raises `ValueError` for an unknown `filter_logic`."""
        return cls(tuple(conditions), any_suffices(filter_logic))

    def match(self, item: T) -> bool:
        """Whether `item` is one of those asked for."""
        if not self.conditions:
            return True
        results = (condition(item) for condition in self.conditions)
        return any(results) if self.any_suffices else all(results)


def any_suffices(filter_logic: FilterLogic) -> bool:
    """Whether one of several filters is enough. Raises `ValueError` for an unknown `filter_logic`."""
    if filter_logic not in ("and", "or"):
        raise ValueError(f"filter_logic must be 'and' or 'or', not {filter_logic!r}")
    return filter_logic == "or"


def check_texts(**texts: Any) -> None:
    """Filters by name. Raises `TypeError` for one that is neither a text nor None."""
    for name, text in texts.items():
        if text is not None:
            check_text(text, name)


def field_conditions(
    exact: dict[str, str | None], contains: dict[str, str | None]
) -> list[Callable[[Any], bool]]:
    """Conditions on fields by name: equal to a text, or containing it. None is no condition. Raises `TypeError`
    for anything else."""
    check_texts(**exact, **{f"{field}_contains": part for field, part in contains.items()})
    return [
        *(_equals(field, wanted) for field, wanted in exact.items() if wanted is not None),
        *(_holds(field, part) for field, part in contains.items() if part is not None),
    ]


def _equals(field: str, wanted: Any) -> Callable[[Any], bool]:
    return lambda item: bool(getattr(item, field) == wanted)


def _holds(field: str, part: str) -> Callable[[Any], bool]:
    return lambda item: part in (getattr(item, field) or "")


@dataclass(frozen=True)
class SpanQuery:
    """Which spans of a rollout, and in which order; for spans as they rest, encoded."""

    filters: Filters[_StoredSpan]
    page: Page

    @classmethod
    def of(
        cls,
        *,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        **conditions: str | None,
    ) -> SpanQuery:
        """Check the parameters of `LightningStore.query_spans`. Raises `ValueError` as that does."""
        page = Page.of(sort_by, sort_order, limit, offset, SPAN_SORT_FIELDS)
        if page.sort_by == "sequence_id":
            page = replace(page, sort_by=None)  # attempt by attempt: the order they are in
        held = {name: value for name, value in conditions.items() if name.endswith(_CONTAINS)}
        exact = {name: value for name, value in conditions.items() if name not in held}
        contained = {name.removesuffix(_CONTAINS): value for name, value in held.items()}
        return cls(Filters.of(field_conditions(exact, contained), filter_logic), page)

    def select(
        self, records: Iterable[SpanRecord], attempts: Mapping[str, int]
    ) -> PaginatedResult[SpanRecord]:
        """Those of `records` that are asked for; in the order of `attempts`, if no other is."""
        found = self.page.result(filter(self.filters.match, _in_order(map(_StoredSpan, records), attempts)))
        return self.page.paginated([span.record for span in found], found.total)


class _StoredSpan:
    """A stored span, as conditions and orders see it: None for what the span does not have.

    Most queries ask for no more than its record tells, and that is known without decoding it.
    """

    def __init__(self, record: SpanRecord) -> None:
        self.record = record
        self.attempt_id = record.attempt_id
        self.span_id = record.span_id
        self.sequence_id = record.sequence_id

    @cached_property
    def _message(self) -> span_pb2.Span:
        return self.record.to_message()

    def __getattr__(self, name: str) -> Any:
        message: Any = self._message
        return (
            None if name in _OPTIONAL_SPAN_FIELDS and not message.HasField(name) else getattr(message, name)
        )


def _in_order(spans: Iterable[_StoredSpan], attempts: Mapping[str, int]) -> list[_StoredSpan]:
    """Attempt by attempt, and by number; those that were given the same number, by time."""

    def place(span: _StoredSpan) -> tuple[int, int]:
        return attempts[span.attempt_id], span.sequence_id

    ordered = sorted(spans, key=place)
    if len(set(map(place, ordered))) < len(ordered):
        ordered.sort(key=lambda span: (*place(span), span.start_time or 0.0, span.end_time or 0.0))
    return ordered


def check_members(values: Sequence[Any] | None, allowed: Sequence[str], name: str) -> frozenset[Any] | None:
    """The elements of a `…_in` filter. Raises `ValueError` naming an element that is none of `allowed`."""
    if values is None:
        return None
    members = as_list(values, name)
    for value in members:
        if value not in allowed:
            raise ValueError(f"{name} has {value!r}; choose from {', '.join(allowed)}")
    return frozenset(members)


@dataclass(frozen=True)
class RolloutQuery:
    """Which rollouts; kept as data, for backends answer it from their indexes."""

    status_in: frozenset[str] | None
    rollout_id_in: tuple[str, ...] | None
    rollout_id_contains: str | None
    any_suffices: bool
    page: Page

    def match(self, record: RolloutRecord) -> bool:
        """Whether a record is one of those asked for."""
        results: list[bool] = []
        if self.status_in is not None:
            results.append(record.status in self.status_in)
        if self.rollout_id_in is not None:
            results.append(record.rollout_id in self.rollout_id_in)
        if self.rollout_id_contains is not None:
            results.append(self.rollout_id_contains in record.rollout_id)
        return not results or (any(results) if self.any_suffices else all(results))
