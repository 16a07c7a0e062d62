"""Those verbs of the contract, over any `Persistence`, that record what an agent did: its spans, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lightning.codec.building import DecodedLater
from lightning.store import lifecycle
from lightning.store.arguments import unknown_attempt
from lightning.store.idempotency import applied_value, current_request, mark_applied
from lightning.store.reading import ReadingVerbs
from lightning.store.records import RolloutRecord, SpanReceipt, SpanRecord
from lightning.store.texts import check_text
from lightning.types import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


class RecordingVerbs(ReadingVerbs):
    """The verbs that take spans and give out their numbers."""

    async def add_span(self, span: Span) -> Span | None:
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        records = [SpanRecord.of(span) for span in spans]
        receipts = await self.add_span_records([span.rollout_id for span in spans], records)
        stored = [
            record._replace(sequence_id=receipt.sequence_id)
            for record, receipt in zip(records, receipts, strict=True)
            if receipt.stored
        ]
        return DecodedLater(SpanRecord.to_span, stored)

    async def deliver_spans(self, spans: Sequence[Span]) -> int:
        records = [SpanRecord.of(span) for span in spans]
        receipts = await self.add_span_records([span.rollout_id for span in spans], records)
        return sum(receipt.stored for receipt in receipts)

    async def add_span_records(
        self, rollout_ids: Sequence[str], records: Sequence[SpanRecord]
    ) -> list[SpanReceipt]:
        """`add_many_spans` for who has them encoded, and checked, already.

        Args:
            rollout_ids: The rollout of each span.
            records: The spans.

        Returns:
            What became of each.
        """
        now = await self._enter()
        groups: dict[tuple[str, str], list[int]] = {}
        for index, (rollout_id, record) in enumerate(zip(rollout_ids, records, strict=True)):
            groups.setdefault((rollout_id, record.attempt_id), []).append(index)
        if len(groups) > 1:  # none is to be stored if one of them cannot be
            await self._check_attempts_exist(groups)
        receipts: dict[int, SpanReceipt] = {}
        for (rollout_id, attempt_id), indexes in groups.items():
            given = await self._complete(
                self._append_spans(rollout_id, attempt_id, [records[i] for i in indexes], now)
            )
            receipts.update(zip(indexes, given, strict=True))
        return [receipts[index] for index in range(len(records))]

    async def _append_spans(
        self, rollout_id: str, attempt_id: str, spans: Sequence[SpanRecord], now: float
    ) -> list[SpanReceipt]:
        result = await self._persistence.append_spans(
            rollout_id,
            attempt_id,
            spans,
            lambda record, fresh: lifecycle.receive_spans(record, attempt_id, fresh, now),
            partial(lifecycle.settle, now=now),
        )
        if result is None:
            raise await self._unknown(rollout_id)
        change, receipts = result
        self._tell(change.before, change.after)
        return receipts

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        return await self.add_span(
            Span.from_opentelemetry(readable_span, rollout_id, attempt_id, sequence_id or 0)
        )

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(
        self, rollout_attempt_ids: Sequence[tuple[str, str]]
    ) -> Sequence[int]:
        await self._enter()
        groups: dict[tuple[str, str], list[int]] = {}
        for index, (rollout_id, attempt_id) in enumerate(rollout_attempt_ids):
            groups.setdefault((rollout_id, attempt_id), []).append(index)
        await self._check_attempts_exist(groups)
        allocated = [0] * len(rollout_attempt_ids)
        for (rollout_id, attempt_id), indexes in groups.items():
            last = await self._allocate(rollout_id, attempt_id, len(indexes))
            for sequence_id, index in enumerate(indexes, start=last - len(indexes) + 1):
                allocated[index] = sequence_id
        return allocated

    async def _allocate(self, rollout_id: str, attempt_id: str, count: int) -> int:
        """Set `count` sequence ids aside; returns the last of them."""
        digest = current_request(attempt_id)
        last = 0

        def allocate(record: RolloutRecord) -> RolloutRecord:
            nonlocal last
            given = applied_value(record, digest)
            if given is not None:
                last = given
                return record
            after = lifecycle.allocate_span_sequence_ids(record, attempt_id, count)
            last = lifecycle.last_span_sequence_id(after, attempt_id)
            return mark_applied(after, digest, last)

        if await self._persistence.change_rollout(rollout_id, allocate) is None:
            raise await self._unknown(rollout_id)
        return last

    async def _check_attempts_exist(self, keys: Iterable[tuple[str, str]]) -> None:
        for rollout_id, attempt_id in keys:
            record = await self._require_rollout(rollout_id)
            check_text(attempt_id, "attempt_id")
            if not any(attempt.attempt_id == attempt_id for attempt in record.attempts):
                raise unknown_attempt(rollout_id, attempt_id)
