"""Spans: a document for what arrives together, and a unique index that makes it impossible to store one twice.

Sequence ids are taken from the attempt's record first, by compare-and-swap, then the spans are stored under them. A
server that dies in between leaves a gap in the numbers of a call that it never acknowledged, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from bson import ObjectId
from pymongo.errors import BulkWriteError

from lightning.store.persistence.abc import RolloutChange, SpanTransition
from lightning.store.persistence.mongo.batches import Batcher, KeyedBatcher
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
_MAX_APPENDS_AT_ONCE = 64
_MAX_REMEMBERED_SPANS = 50_000
"""Some 25 MB, if each of them is the only one of its attempt."""


@dataclass(frozen=True)
class _Append:
    """A call's spans for an attempt."""

    spans: Sequence[SpanRecord]
    transition: SpanTransition


@dataclass
class _Stored:
    """All spans that an attempt has, as far as the last of its sequence ids tells."""

    last_sequence_id: int = 0
    span_ids: set[str] = field(default_factory=set)


class _Outdated(Exception):
    """The attempt has other spans by now."""


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
        self._appends = KeyedBatcher(self._append_together, max_items=_MAX_APPENDS_AT_ONCE)
        self._stored: OrderedDict[tuple[str, str], _Stored] = OrderedDict()
        """Of attempts that have all their spans from this server, those last heard of. If another one stores some after
        all, the sequence ids tell; where they do not, the unique index does."""
        self._remembered_spans = 0

    async def close(self) -> None:
        """Wait for what is under way."""
        for batcher in (self._appends, self._inserts):
            await batcher.close()

    async def append(
        self, rollout_id: str, attempt_id: str, spans: Sequence[SpanRecord], transition: SpanTransition
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        """See `Persistence.append_spans`."""
        return await self._appends.do((rollout_id, attempt_id), _Append(spans, transition))

    async def _append_together(
        self, key: tuple[str, str], appends: list[_Append]
    ) -> Sequence[tuple[RolloutChange, list[SpanReceipt]] | None]:
        stored = await self._recall(key)
        received = None if stored is None else await self._receive_after(key, appends, stored)
        if received is None:
            stored = None
            received = await self._receive(key, appends, await self._known(key, _span_ids(appends)))
        change, numbered = received
        if change is None:
            return [None] * len(appends)
        for batch in _batches(numbered.values()):
            for span in await self._store(key, batch):
                del numbered[span.span_id]
        if stored is not None:
            stored.last_sequence_id = _last_sequence_id(change.after, key[1])
            self._remember(key, stored)
        results = []
        for append in appends:
            results.append((change, [_receipt(numbered.pop(span.span_id, None)) for span in append.spans]))
            change = RolloutChange(change.after, change.after)  # the first has made it for all
        return results

    async def _recall(self, key: tuple[str, str]) -> _Stored | None:
        """All spans of an attempt, if this server knows them."""
        stored = self._stored.pop(key, None)
        if stored is not None:
            self._remembered_spans -= len(stored.span_ids)
            return stored
        rollout = await self._rollouts.peek(key[0])
        none_yet = rollout is not None and not _last_sequence_id(rollout.record, key[1])
        return _Stored() if none_yet else None

    def _remember(self, key: tuple[str, str], stored: _Stored) -> None:
        self._stored[key] = stored
        self._remembered_spans += len(stored.span_ids)
        while self._remembered_spans > _MAX_REMEMBERED_SPANS:
            _, oldest = self._stored.popitem(last=False)
            self._remembered_spans -= len(oldest.span_ids)

    async def _receive_after(
        self, key: tuple[str, str], appends: Sequence[_Append], stored: _Stored
    ) -> tuple[RolloutChange | None, dict[str, SpanRecord]] | None:
        """As `_receive`, if these are all spans that the attempt has; None if they are not."""
        try:
            return await self._receive(key, appends, stored.span_ids, stored.last_sequence_id)
        except _Outdated:
            return None

    async def _receive(
        self,
        key: tuple[str, str],
        appends: Sequence[_Append],
        taken: set[str],
        last_sequence_id: int | None = None,
    ) -> tuple[RolloutChange | None, dict[str, SpanRecord]]:
        """Change the rollout.

        Args:
            key: The rollout and the attempt.
            appends: What is to be stored.
            taken: The span ids that the attempt has; those that it gets are added.
            last_sequence_id: What the attempt's last one must be; None: any.

        Returns:
            The change, and the spans to store, numbered, by span id.

        Raises:
            _Outdated: The attempt's last sequence id is another. Nothing was changed.
        """
        rollout_id, attempt_id = key
        fresh = [_fresh(append.spans, taken) for append in appends]
        sequence_ids: list[int] = []

        def receive(record: RolloutRecord) -> RolloutRecord:
            if last_sequence_id not in (None, _last_sequence_id(record, attempt_id)):
                raise _Outdated
            sequence_ids.clear()
            for append, spans in zip(appends, fresh, strict=True):
                record, numbers = append.transition(record, spans)
                sequence_ids.extend(numbers)
            return record

        change = await self._rollouts.change(rollout_id, receive)
        if change is None:
            return None, {}
        spans = chain.from_iterable(fresh)
        numbered = {
            span.span_id: span._replace(sequence_id=sequence_id)
            for span, sequence_id in zip(spans, sequence_ids, strict=True)
        }
        return RolloutChange(*change), numbered

    async def _known(self, key: tuple[str, str], span_ids: Sequence[str]) -> set[str]:
        """Which of these spans the attempt has."""
        rollout_id, attempt_id = key
        if not (is_text(rollout_id) and is_text(attempt_id)):
            return set()
        condition = {**self._of(rollout_id), "attempt_id": attempt_id, "span_ids": {"$in": span_ids}}
        found = await self._connection.run(
            lambda: self._collection.find(condition, {"span_ids": 1}).to_list()
        )
        return {span_id for document in found for span_id in document["span_ids"]}

    def _of(self, rollout_id: str) -> Document:
        return {"partition": self._partition, "rollout_id": rollout_id}

    async def _store(self, key: tuple[str, str], spans: list[SpanRecord]) -> list[SpanRecord]:
        """Store spans; returns those that another server was quicker to store."""
        rollout_id, attempt_id = key
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
            known = await self._known(key, [span.span_id for span in left])
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


def _last_sequence_id(record: RolloutRecord, attempt_id: str) -> int:
    """0: the attempt has no spans, for their numbers are taken before they are stored."""
    attempt = record.find_attempt(attempt_id)
    return 0 if attempt is None else attempt.last_span_sequence_id


def _span_ids(appends: Iterable[_Append]) -> list[str]:
    return [span.span_id for append in appends for span in append.spans]


def _fresh(spans: Iterable[SpanRecord], taken: set[str]) -> list[SpanRecord]:
    """The spans whose ids are not taken, each once; they are then."""
    fresh = []
    for span in spans:
        if span.span_id not in taken:
            taken.add(span.span_id)
            fresh.append(span)
    return fresh


def _receipt(stored: SpanRecord | None) -> SpanReceipt:
    return SpanReceipt(0, stored=False) if stored is None else SpanReceipt(stored.sequence_id, stored=True)


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
