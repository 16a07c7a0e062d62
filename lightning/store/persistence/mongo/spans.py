"""Spans: a document for what arrives together, and a unique index that makes it impossible to store one twice.

Sequence ids are taken from the attempt's record first, by compare-and-swap, then the spans are stored under them. A
server that dies in between leaves a gap in the numbers of a call that it never acknowledged, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bson import ObjectId
from pymongo.errors import BulkWriteError

from lightning.store.persistence.abc import RolloutChange, SpanTransition
from lightning.store.persistence.mongo.batches import Batcher, Turns
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import NEXT, Spill, content
from lightning.store.persistence.mongo.payloads import MongoPayloads, PayloadGone
from lightning.store.persistence.mongo.records import DUPLICATE_KEY, MongoRecords, is_text
from lightning.store.persistence.mongo.schema import SPANS
from lightning.store.records import RolloutRecord, SpanReceipt, SpanRecord

_BATCH_BYTES = 8 * 1024 * 1024
"""Half of the size that a document can have; a larger span rests beside the document."""
_BATCH_SPANS = 1000
_MAX_INSERTS_AT_ONCE = 64


class _NotTheFirst(Exception):
    """The attempt has spans by now."""


class MongoSpans:
    """The spans of a partition, for one event loop."""

    def __init__(
        self,
        connection: MongoConnection,
        rollouts: MongoRecords[RolloutRecord],
        payloads: MongoPayloads,
        partition: str,
    ) -> None:
        self._connection = connection
        self._rollouts = rollouts
        self._payloads = payloads
        self._partition = partition
        self._collection = connection.collection(SPANS)
        self._inserts = Batcher(self._insert_batch, max_items=_MAX_INSERTS_AT_ONCE)
        self._turns = Turns()

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._inserts.close()

    async def append(
        self, rollout_id: str, attempt_id: str, spans: Sequence[SpanRecord], transition: SpanTransition
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        """See `Persistence.append_spans`."""
        async with self._turns.take((rollout_id, attempt_id)):
            received = await self._receive(rollout_id, attempt_id, spans, transition)
            if received is None:
                return None
            change, numbered = received
            for batch in _batches(numbered.values()):
                for span in await self._store(rollout_id, attempt_id, batch):
                    del numbered[span.span_id]
        receipts = []
        for span in spans:
            stored = numbered.pop(span.span_id, None)
            receipts.append(SpanReceipt(stored.sequence_id if stored else 0, stored is not None))
        return change, receipts

    async def _receive(
        self, rollout_id: str, attempt_id: str, spans: Sequence[SpanRecord], transition: SpanTransition
    ) -> tuple[RolloutChange, dict[str, SpanRecord]] | None:
        """Change the rollout; returns also the spans to store, numbered, by span id."""
        rollout = await self._rollouts.peek(rollout_id)
        is_first = rollout is not None and not _can_have_spans(rollout.record, attempt_id)
        known: set[str] = set()
        if not is_first:
            known = await self._known(rollout_id, attempt_id, [span.span_id for span in spans])
        fresh: dict[str, SpanRecord] = {}
        for span in spans:
            if span.span_id not in known:
                fresh.setdefault(span.span_id, span)
        sequence_ids: list[int] = []

        def receive(record: RolloutRecord) -> RolloutRecord:
            nonlocal sequence_ids
            if is_first and _can_have_spans(record, attempt_id):
                raise _NotTheFirst
            after, sequence_ids = transition(record, list(fresh.values()))
            return after

        try:
            change = await self._rollouts.change(rollout_id, receive)
        except _NotTheFirst:  # it was, a moment ago
            return await self._receive(rollout_id, attempt_id, spans, transition)
        if change is None:
            return None
        numbered = {
            span.span_id: span._replace(sequence_id=sequence_id)
            for span, sequence_id in zip(fresh.values(), sequence_ids, strict=True)
        }
        return RolloutChange(*change), numbered

    async def _known(self, rollout_id: str, attempt_id: str, span_ids: Sequence[str]) -> set[str]:
        """Which of these spans the attempt has."""
        if not (is_text(rollout_id) and is_text(attempt_id)):
            return set()
        condition = {**self._of(rollout_id), "attempt_id": attempt_id, "span_ids": {"$in": list(span_ids)}}
        found = await self._connection.run(
            lambda: self._collection.find(condition, {"span_ids": 1}).to_list()
        )
        return {span_id for document in found for span_id in document["span_ids"]}

    def _of(self, rollout_id: str) -> Document:
        return {"partition": self._partition, "rollout_id": rollout_id}

    async def _store(self, rollout_id: str, attempt_id: str, spans: list[SpanRecord]) -> list[SpanRecord]:
        """Store spans; returns those that another server was quicker to store."""
        left = spans
        while left:
            spill = Spill()
            document = {
                "_id": ObjectId(),
                **self._of(rollout_id),
                "attempt_id": attempt_id,
                "arrived": NEXT,
                "span_ids": [span.span_id for span in left],
                "sequence_ids": [span.sequence_id for span in left],
                "payloads": [spill.place(span.payload, _BATCH_BYTES) for span in left],
                "count": len(left),
                "size_bytes": sum(len(span.payload) for span in left),
            }
            await self._payloads.write(spill, SPANS, document["_id"], rollout_id=rollout_id)
            if await self._inserts.do(document):
                await self._payloads.confirm(spill)
                break
            await self._payloads.discard(spill)
            known = await self._known(rollout_id, attempt_id, [span.span_id for span in left])
            left = [span for span in left if span.span_id not in known]
        kept = {span.span_id for span in left}
        return [span for span in spans if span.span_id not in kept]

    async def _insert_batch(self, documents: list[Document]) -> list[bool]:
        """Whether each document is stored; it is not if one of its spans is there already."""

        async def insert() -> list[bool]:
            try:
                await self._collection.insert_many(documents, ordered=False)
            except BulkWriteError as error:
                if any(part["code"] != DUPLICATE_KEY for part in error.details["writeErrors"]):
                    raise
                # It may also have been an earlier try that stored it.
                ids = [document["_id"] for document in documents]
                found = await self._collection.find({"_id": {"$in": ids}}, {"_id": 1}).to_list()
                present = {document["_id"] for document in found}
                return [document_id in present for document_id in ids]
            return [True] * len(documents)

        return await self._connection.persist(insert)

    async def find(self, rollout_id: str, attempt_ids: Sequence[str]) -> list[SpanRecord]:
        """See `Persistence.find_spans`."""
        if not is_text(rollout_id):
            return []
        condition = {**self._of(rollout_id), "attempt_id": {"$in": list(filter(is_text, attempt_ids))}}
        documents = await self._connection.run(lambda: self._collection.find(condition).to_list())
        documents.sort(key=lambda document: document["arrived"])
        by_attempt: dict[str, list[SpanRecord]] = {attempt_id: [] for attempt_id in attempt_ids}
        for document in documents:
            by_attempt[document["attempt_id"]].extend(await self._read(document))
        found: list[SpanRecord] = []
        for spans in by_attempt.values():
            found.extend(sorted(spans, key=lambda span: span.sequence_id))
        return found

    async def _read(self, document: Document) -> list[SpanRecord]:
        try:
            contents = await self._payloads.contents(document)
        except PayloadGone:
            return []  # spans never change: they are being deleted with their rollout, whose time is up
        return [
            SpanRecord(document["attempt_id"], span_id, sequence_id, content(stored, contents))
            for span_id, sequence_id, stored in zip(
                document["span_ids"], document["sequence_ids"], document["payloads"], strict=True
            )
        ]


def _can_have_spans(record: RolloutRecord, attempt_id: str) -> bool:
    attempt = record.find_attempt(attempt_id)
    return attempt is not None and attempt.last_span_sequence_id > 0  # taken before anything is stored


def _batches(spans: Iterable[SpanRecord]) -> Iterator[list[SpanRecord]]:
    """Cut into what fits into a document."""
    batch: list[SpanRecord] = []
    size = 0
    for span in list(spans):
        if batch and (size + len(span.payload) > _BATCH_BYTES or len(batch) == _BATCH_SPANS):
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += len(span.payload)
    if batch:
        yield batch
