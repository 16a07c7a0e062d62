"""Moving everything that a store holds to another one, of whatever backend, by way of lines of JSON.

That is rollouts with their attempts, the queue with its order, spans, resources with all versions, workers, the numbers
that were given to spans, and the requests that must have no second effect. What a store did (how many spans it has
dropped, how often it was written) stays with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace

from lightning.store import lifecycle
from lightning.store.lines import (
    VERSION,
    EndLine,
    HeaderLine,
    Line,
    ResourcesLine,
    RolloutLine,
    SpanLine,
    WorkerLine,
    read_line,
    write_line,
)
from lightning.store.persistence.abc import Persistence
from lightning.store.queries import Page, RolloutQuery
from lightning.store.records import RolloutRecord, SpanRecord

_PAGE_ROLLOUTS = 500
_BATCH_LINES = 2000


async def export_lines(source: Persistence) -> AsyncIterator[bytes]:
    """Everything in a store, line by line. Nobody may change the store meanwhile.

    Raises:
        SpansEvictedError: Spans are no longer all there.
        BackendError: It cannot be read.
    """
    count = 0
    async for line in _lines_of(source):
        yield write_line(line)
        count += 1
    yield write_line(EndLine(lines=count))


async def _lines_of(source: Persistence) -> AsyncIterator[Line]:
    yield HeaderLine()
    for resources in await source.find_resources():
        yield ResourcesLine.of(resources)
    places = {rollout_id: place for place, rollout_id in enumerate(await source.queue_order())}
    page = Page(None, False, _PAGE_ROLLOUTS, 0)
    while records := (await source.find_rollouts(RolloutQuery(None, None, None, False, page)))[0]:
        for record in records:
            yield RolloutLine.of(record, places.get(record.rollout_id))
            attempt_ids = [attempt.attempt_id for attempt in record.attempts]
            for span in await source.find_spans(record.rollout_id, attempt_ids):
                yield SpanLine.of(span)
        page = replace(page, offset=page.offset + len(records))
    for worker in await source.find_workers():
        yield WorkerLine.of(worker)


class ImportRefusedError(ValueError):
    """What should be imported is no export, or not a whole one, or there is something in the store already."""


async def import_lines(lines: Iterable[bytes], target: Persistence) -> int:
    """Put what `export_lines` gave into an empty store; returns how many records that were.

    Nobody else may use the store meanwhile. If this fails, some of the records may be in it.

    Raises:
        ImportRefusedError: With the number of the line that is at fault.
        BackendError: The store cannot be written.
    """
    totals = await target.totals()
    if totals.rollouts_by_status or totals.resources or totals.workers:
        raise ImportRefusedError("the store is not empty; import into a new one")
    importing = _Import(target)
    number = 0
    try:
        for number, line in _numbered(lines):  # noqa: B007  # it is looked at after the loop
            await importing.take(line)
        await importing.finish()
    except ImportRefusedError:
        raise
    except ValueError as error:
        raise ImportRefusedError(f"line {number}: {error}") from error
    return number - 2  # the header and the end


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, Line]]:
    """The lines of one whole export."""
    number = 0
    line: Line | None = None
    for number, data in enumerate(lines, start=1):
        if isinstance(line, EndLine):
            raise ImportRefusedError(f"line {number}: something follows the end")
        try:
            line = read_line(data)
            if isinstance(line, HeaderLine) != (number == 1):
                raise ValueError("the header must be the first line, and no other")
            if isinstance(line, HeaderLine) and line.version != VERSION:
                raise ValueError(f"this is version {line.version} of the format, known here is {VERSION}")
            if isinstance(line, EndLine) and line.lines != number - 1:
                raise ValueError(f"the end speaks of {line.lines} lines before it")
        except ValueError as error:
            raise ImportRefusedError(f"line {number}: {error}") from error
        yield number, line
    if not isinstance(line, EndLine):
        raise ImportRefusedError(f"the end is missing after line {number}: this is not a whole export")


class _Import:
    """Takes line by line, and stores what came together.

    Args:
        target: Where to.
    """

    def __init__(self, target: Persistence) -> None:
        self._target = target
        self._seen: set[str] = set()
        self._last: RolloutRecord | None = None
        self._records: list[RolloutRecord] = []
        self._spans: dict[tuple[str, str], list[SpanRecord]] = {}
        self._waiting = 0
        """How many lines have not been stored yet."""
        self._queue_length = 0
        self._parked: dict[int, RolloutRecord] = {}
        """By their places, those that do not enter the queue in the order of their creation."""

    async def take(self, line: Line) -> None:
        """Raises `ValueError` if it does not go with those before it."""
        if isinstance(line, RolloutLine):
            self._take_rollout(line)
        elif isinstance(line, SpanLine):
            self._take_span(line)
        elif isinstance(line, ResourcesLine):
            if not await self._target.insert_resources(line.to_record()):
                raise ValueError(f"version {line.version} of resources {line.resources_id!r} is out of order")
        elif isinstance(line, WorkerLine):
            self._note_new(f"worker {line.worker_id!r}")
            record = line.to_record()
            await self._target.change_worker(line.worker_id, lambda _: record)
        self._waiting += 1
        if self._waiting >= _BATCH_LINES:
            await self._store()

    def _take_rollout(self, line: RolloutLine) -> None:
        record = line.to_record()
        self._note_new(f"rollout {line.rollout_id!r}")
        for number, attempt in enumerate(record.attempts, start=1):
            self._note_new(f"attempt {attempt.attempt_id!r}")
            if attempt.sequence_id != number:
                raise ValueError(
                    f"attempt {attempt.attempt_id!r} is number {number}, not {attempt.sequence_id}"
                )
        self._records.append(self._queued(record, line.queue_place))
        self._last = record

    def _queued(self, record: RolloutRecord, place: int | None) -> RolloutRecord:
        """The record to store for now: one whose place in the queue is behind those of others is queued later."""
        if lifecycle.is_queued(record) != (place is not None):
            raise ValueError(f"queue_place {place} does not go with the status {record.status!r}")
        if place is None:
            return record
        if place < self._queue_length or place in self._parked:
            raise ValueError(f"queue_place {place} is taken")
        if place == self._queue_length:
            self._queue_length += 1
            return record
        self._parked[place] = record
        return record._replace(status="preparing")

    def _take_span(self, line: SpanLine) -> None:
        attempts = () if self._last is None else self._last.attempts
        if self._last is None or line.attempt_id not in {attempt.attempt_id for attempt in attempts}:
            raise ValueError(f"no rollout with the attempt {line.attempt_id!r} is before it")
        key = self._last.rollout_id, line.attempt_id
        self._spans.setdefault(key, []).append(line.to_record())

    def _note_new(self, name: str) -> None:
        if name in self._seen:
            raise ValueError(f"{name} is there twice")
        self._seen.add(name)

    async def _store(self) -> None:
        await self._target.insert_rollouts(self._records)
        await asyncio.gather(*(self._store_spans(*key, spans) for key, spans in self._spans.items()))
        self._records, self._spans, self._waiting = [], {}, 0

    async def _store_spans(self, rollout_id: str, attempt_id: str, spans: list[SpanRecord]) -> None:
        result = await self._target.append_spans(
            rollout_id, attempt_id, spans, lambda record, new: (record, [span.sequence_id for span in new])
        )
        for span, receipt in zip(spans, result[1] if result else (), strict=True):
            if not receipt.stored:
                raise ImportRefusedError(f"span {span.span_id!r} of attempt {attempt_id!r} is there twice")

    async def finish(self) -> None:
        """Store the rest. Raises `ValueError` if the queue has gaps."""
        await self._store()
        for place, record in sorted(self._parked.items()):
            if place != self._queue_length:
                raise ValueError(f"nobody has place {self._queue_length} in the queue")
            self._queue_length += 1
            await self._target.change_rollout(record.rollout_id, lambda _, record=record: record)  # type: ignore[misc]
