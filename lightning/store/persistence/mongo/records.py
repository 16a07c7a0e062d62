"""Records that are one document each, changed by compare-and-swap.

A document carries the token of its last change, and those of a few before. A change is made on condition that the
token is still the one that was read; so none is lost, however many servers there are, and without a transaction. When
the outcome of a try is unknown, the tokens tell.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, NoReturn, TypeVar

from bson import ObjectId
from bson.errors import BSONError
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, OperationFailure

from lightning.store.persistence.abc import AttemptTakenError, BackendUnavailableError
from lightning.store.persistence.mongo.batches import Batcher, KeyedBatcher
from lightning.store.persistence.mongo.connection import Document, MongoConnection, error_codes
from lightning.store.persistence.mongo.documents import (
    ChangeTokens,
    Form,
    Spill,
    updated_document,
    with_token,
)
from lightning.store.persistence.mongo.payloads import MongoPayloads, PayloadGone

RecordT = TypeVar("RecordT")

_MAX_CHANGES_AT_ONCE = 256
_MAX_SWAPS_AT_ONCE = 64
_MAX_READS_AT_ONCE = 256
_MAX_INSERTS_AT_ONCE = 500
_MAX_LOOKUPS_AT_ONCE = 5000
_MAX_KNOWN = 4096
_CONFLICT_PAUSE_SECONDS = 0.002
"""Doubles with every conflict over the same record."""
_LONGEST_PAUSE_SECONDS = 0.1

DUPLICATE_KEY = 11000
_TOO_LARGE_CODES = frozenset({10334, 17419, 17420})


@dataclass(frozen=True)
class Read(Generic[RecordT]):
    """A record as it was read: with the document, which a swap needs."""

    document: Document
    record: RecordT


@dataclass(frozen=True)
class Prepared(Generic[RecordT]):
    """A new record, ready to be stored."""

    record: RecordT
    document: Document
    spill: Spill


@dataclass
class _Swap:
    key: Document
    expected: ObjectId
    token: ObjectId
    update: Document
    tried: bool = False
    """Whether it may have been made already."""


class MongoRecords(Generic[RecordT]):
    """A collection of records, of one partition, for one event loop.

    Args:
        connection: The connection of the loop.
        name: Of the collection.
        form: How they rest.
        payloads: Where large payloads go.
        tokens: Ids for changes.
        create: Makes a record, given its id, for a change to begin with if there is none; None: there are no others.
    """

    def __init__(
        self,
        connection: MongoConnection,
        name: str,
        form: Form[RecordT],
        payloads: MongoPayloads,
        tokens: ChangeTokens,
        create: Callable[[str], RecordT] | None = None,
    ) -> None:
        self.name = name
        self.collection = connection.collection(name)
        self._connection = connection
        self._form = form
        self._payloads = payloads
        self._tokens = tokens
        self._create = create
        self._changes = KeyedBatcher(self._change_together, max_items=_MAX_CHANGES_AT_ONCE)
        self._swaps = Batcher(self._swap_batch, max_items=_MAX_SWAPS_AT_ONCE)
        self._reads: Batcher[str, Document | None] = Batcher(self._read_batch, max_items=_MAX_READS_AT_ONCE)
        self._looks: Batcher[str, Document | None] = Batcher(self._look_batch, max_items=_MAX_READS_AT_ONCE)
        self._known: OrderedDict[str, Read[RecordT]] = OrderedDict()
        """As this server left them. Others may have changed them since; a swap finds out."""
        self._inserts = Batcher(self._insert_batch, max_items=_MAX_INSERTS_AT_ONCE)

    async def close(self) -> None:
        """Wait for what is under way."""
        for batcher in (self._changes, self._swaps, self._reads, self._looks, self._inserts):
            await batcher.close()

    # --- Reading ---

    async def get(self, record_id: str) -> RecordT | None:
        """One record, or None."""
        read = await self.read(record_id)
        return None if read is None else read.record

    async def get_if_changed(self, record_id: str, stored: RecordT) -> RecordT | None:
        """The record, if it is not as it was stored any more; None also if it is gone. For forms that have marks."""
        marks = await self._looks.do(record_id)
        unchanged = marks is None or self._form.stored(stored, marks) == stored
        return None if unchanged else await self.get(record_id)

    async def get_many(self, record_ids: Sequence[str]) -> dict[str, RecordT]:
        """Those of these records that exist, by id."""
        found: dict[str, RecordT] = {}
        wanted = [record_id for record_id in dict.fromkeys(record_ids) if is_text(record_id)]
        for start in range(0, len(wanted), _MAX_LOOKUPS_AT_ONCE):
            some = wanted[start : start + _MAX_LOOKUPS_AT_ONCE]
            documents = await self._connection.run(lambda some=some: self._find(some))  # type: ignore[misc]
            present = {
                record_id: document for record_id, document in zip(some, documents, strict=True) if document
            }
            for read in await self.decode_all(present.values()):
                found[read.document["_id"][self._form.id_field]] = read.record
        return found

    async def read(self, record_id: str) -> Read[RecordT] | None:
        """One record as it is at this moment, to be swapped; None if there is none."""
        while is_text(record_id):
            document = await self._reads.do(record_id)
            if document is None:
                break
            try:
                return await self.decode(document)
            except PayloadGone:
                continue  # it was changed meanwhile
        return None

    async def peek(self, record_id: str) -> Read[RecordT] | None:
        """The same, but maybe not as it is any more."""
        return self._known.get(record_id) or await self.read(record_id)

    async def decode(self, document: Document) -> Read[RecordT]:
        """The record in a document. Raises `PayloadGone` if it was changed since it was read."""
        contents = await self._payloads.contents(document)
        return Read(document, self._form.record(document, contents))

    async def decode_all(self, documents: Iterable[Document]) -> list[Read[RecordT]]:
        """The records in documents that a query found, less those that are gone since."""
        reads = []
        for document in documents:
            try:
                reads.append(await self.decode(document))
            except PayloadGone:
                read = await self.read(document["_id"][self._form.id_field])
                if read is not None:
                    reads.append(read)
        return reads

    async def _read_batch(self, record_ids: list[str]) -> list[Document | None]:
        return await self._connection.persist(lambda: self._find(record_ids))

    async def _look_batch(self, record_ids: list[str]) -> list[Document | None]:
        keys = [self._form.key(record_id) for record_id in record_ids]
        return await self._connection.persist(lambda: self._marks(keys))

    async def _find(self, record_ids: list[str]) -> list[Document | None]:
        keys = [self._form.key(record_id) for record_id in record_ids]
        if len(keys) == 1:
            return [await self.collection.find_one({"_id": keys[0]})]
        return _in_order(keys, await self.collection.find({"_id": {"$in": keys}}).to_list())

    # --- Changing ---

    async def change(
        self, record_id: str, transition: Callable[[RecordT], RecordT]
    ) -> tuple[RecordT, RecordT] | None:
        """Replace a record by what `transition` makes of it: from the present record to the next, or to the same one if
        nothing changes.

        Returns:
            The record before and after; None if there is none, and none can be made.
        """
        return await self._changes.do(record_id, transition)

    async def _change_together(
        self, record_id: str, transitions: list[Callable[[RecordT], RecordT]]
    ) -> Sequence[tuple[RecordT, RecordT] | None]:
        """Make changes that wait for the same record, one upon the other, in one swap."""
        read = self._known.pop(record_id, None)  # a swap remembers it anew; what does not fit is outdated
        if read is not None:
            changes = await self._try(read, transitions)
            if changes is not None:
                return changes
        conflicts = _Conflicts(self._connection.settings.timeout_seconds, record_id)
        while True:
            read = await self.read(record_id)
            if read is not None:
                states = _states(read.record, transitions)
                if states[-1] is read.record:
                    await self.settle(read)
                    return list(pairwise(states))
                stored = await self._swap_through(read, states)
                if stored is not None:
                    return list(pairwise(stored))
            elif self._create is None:
                return [None] * len(transitions)
            else:
                states = _states(self._create(record_id), transitions)
                ((record, created),) = await self.insert([states[-1]])
                if created:
                    return list(pairwise([*states[:-1], record]))
            await conflicts.pause()

    async def _try(
        self, known: Read[RecordT], transitions: Sequence[Callable[[RecordT], RecordT]]
    ) -> Sequence[tuple[RecordT, RecordT]] | None:
        """Change a record that may have been changed since; None if it was, or if nothing came of it."""
        try:
            states = _states(known.record, transitions)
        except Exception:  # noqa: BLE001  # raised again if it holds for the record as it is now
            return None
        stored = None if states[-1] is known.record else await self._swap_through(known, states)
        return None if stored is None else list(pairwise(stored))

    async def settle(self, read: Read[RecordT]) -> None:
        """Return when what was read is sure to stay: a write that changes nothing waits for all before it."""
        key = read.document["_id"]
        await self._connection.run(
            lambda: self.collection.update_one({"_id": key}, {"$set": {"partition": key["partition"]}})
        )

    async def swap(self, read: Read[RecordT], after: RecordT) -> RecordT | None:
        """Replace a record if it still is what was read; returns it as stored, None if it had been changed.

        Raises:
            ValueError: The record does not fit into a document.
            AttemptTakenError: Another rollout has an attempt of this id.
        """
        stored = await self._swap_through(read, [read.record, after])
        return None if stored is None else stored[-1]

    async def _swap_through(self, read: Read[RecordT], states: Sequence[RecordT]) -> list[RecordT] | None:
        """As `swap`, for a record that goes from the first of these states, which was read, through the others."""
        spill = Spill()
        update = self._form.update(read.document, states, spill)
        key = read.document["_id"]
        record_id = key[self._form.id_field]
        token = self._tokens.next()
        await self._payloads.write(spill, self.name, key)
        self._known.pop(record_id, None)
        try:
            marks = await self._swaps.do(
                _Swap(key, read.document["change"], token, with_token(update, token))
            )
        except _REFUSALS as error:
            if DUPLICATE_KEY in error_codes(error):
                raise AttemptTakenError(f"an attempt that {key} was to get is another rollout's") from None
            raise_refusal(error, key)
        if marks is None:
            await self._payloads.discard(spill)
            return None
        await self._payloads.confirm(spill)
        stored = [states[0], *(self._form.stored(state, marks) for state in states[1:])]
        self._remember(record_id, Read(updated_document(read.document, update, marks), stored[-1]))
        return stored

    def _remember(self, record_id: str, read: Read[RecordT]) -> None:
        if self._form.is_small(read.record):
            self._known[record_id] = read
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    async def _swap_batch(self, swaps: list[_Swap]) -> list[Document | None]:
        async def swap() -> list[Document | None]:
            alone = len(swaps) == 1 and not swaps[0].tried
            for one in swaps:
                one.tried = True
            if alone:
                return [await self._swap_one(swaps[0])]
            # Those that an earlier try made fit no longer and are left alone; and even that is acknowledged only when a
            # majority has them.
            updates = [UpdateOne({"_id": one.key, "change": one.expected}, one.update) for one in swaps]
            result = await self.collection.bulk_write(updates, ordered=False)
            if result.matched_count == len(swaps) and not self._form.has_marks:
                return [{}] * len(swaps)
            found = await self._marks([one.key for one in swaps])
            return [_outcome(one, document) for one, document in zip(swaps, found, strict=True)]

        return await self._connection.persist(swap)

    async def _swap_one(self, swap: _Swap) -> Document | None:
        return await self.collection.find_one_and_update(
            {"_id": swap.key, "change": swap.expected},
            swap.update,
            projection={"revision": 1},
            return_document=ReturnDocument.AFTER,
        )

    async def _marks(self, keys: list[Document]) -> list[Document | None]:
        """What tells of the last changes."""
        cursor = self.collection.find({"_id": {"$in": keys}}, {"revision": 1, "recent": 1})
        return _in_order(keys, await cursor.to_list())

    # --- Inserting ---

    async def insert(self, records: Sequence[RecordT]) -> list[tuple[RecordT, bool]]:
        """Store new records, in this order; one whose id is taken stays as it is.

        Returns:
            Each record as it is stored, and whether it was stored by this call.

        Raises:
            ValueError: A record does not fit into a document.
        """
        prepared = [await self.prepare(record) for record in records]
        return await self.insert_prepared(prepared)

    async def prepare(self, record: RecordT) -> Prepared[RecordT]:
        """The document of a new record, with all beside it in place."""
        spill = Spill()
        document = self._form.insert(record, self._tokens.next(), spill)
        await self._payloads.write(spill, self.name, document["_id"])
        return Prepared(record, document, spill)

    async def insert_prepared(self, prepared: Sequence[Prepared[RecordT]]) -> list[tuple[RecordT, bool]]:
        """As `insert`."""
        try:
            all_marks = await self._inserts.do([one.document for one in prepared])
        except _REFUSALS as error:
            raise_refusal(error, prepared[0].document["_id"])
        stored = []
        for one, marks in zip(prepared, all_marks, strict=True):
            if marks is not None:
                await self._payloads.confirm(one.spill)
                record = self._form.stored(one.record, marks)
                document = {**one.document, **marks}
                self._remember(document["_id"][self._form.id_field], Read(document, record))
                stored.append((record, True))
                continue
            await self._payloads.discard(one.spill)
            known = await self.read(one.document["_id"][self._form.id_field])
            if known is None:
                raise ValueError(
                    f"{one.document['_id']} cannot be stored: another rollout has an attempt of the same id"
                )
            stored.append((known.record, False))
        return stored

    async def insert_documents(self, documents: list[Document]) -> None:
        """Store documents that were prepared before; those that are there already stay as they are."""
        await self._inserts.do(documents)

    async def _insert_batch(self, groups: list[list[Document]]) -> list[list[Document | None]]:
        """Inserts the documents of all groups; for each its marks, or None if there was one with its id."""
        documents = [document for group in groups for document in group]

        async def insert() -> list[Document | None]:
            try:
                await self.collection.insert_many(documents, ordered=False)
            except BulkWriteError as error:
                if any(part["code"] != DUPLICATE_KEY for part in error.details["writeErrors"]):
                    raise
            return await self._marks([document["_id"] for document in documents])

        found = await self._connection.persist(insert)
        results = iter(
            marks if marks is not None and document["change"] in marks["recent"] else None
            for document, marks in zip(documents, found, strict=True)
        )
        return [[next(results) for _ in group] for group in groups]


def _states(record: RecordT, transitions: Sequence[Callable[[RecordT], RecordT]]) -> Sequence[RecordT]:
    """The record, and what each transition makes of it after the other."""
    return list(accumulate(transitions, lambda state, transition: transition(state), initial=record))


class _Conflicts:
    """Pauses after conflicts, longer each time, and the end of patience."""

    def __init__(self, patience_seconds: float, record_id: str) -> None:
        self._deadline = time.monotonic() + patience_seconds
        self._record_id = record_id
        self._pause = _CONFLICT_PAUSE_SECONDS

    async def pause(self) -> None:
        if time.monotonic() >= self._deadline:
            raise BackendUnavailableError(
                f"{self._record_id!r} is being changed by other servers all the time; nothing was changed by this call"
            )
        await asyncio.sleep(random.uniform(0, self._pause))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)


def _outcome(swap: _Swap, found: Document | None) -> Document | None:
    """Whether a swap was made, by the tokens in its document."""
    if found is None:
        return None
    if swap.token in found["recent"]:
        return found
    if swap.expected in found["recent"]:
        return None  # what followed that was another's
    raise BackendUnavailableError(
        f"whether {swap.key} was changed is unknown: others changed it many times since"
    )


def _in_order(keys: Sequence[Document], documents: Iterable[Document]) -> list[Document | None]:
    by_key = {tuple(document["_id"].values()): document for document in documents}
    return [by_key.get(tuple(key.values())) for key in keys]


_REFUSALS = (OperationFailure, BSONError, OverflowError)


def raise_refusal(error: Exception, key: Document) -> NoReturn:
    """Raise `ValueError` if `error` says that a document cannot be, else `error`."""
    if isinstance(error, (BSONError, OverflowError)) or _TOO_LARGE_CODES & set(error_codes(error)):
        raise ValueError(
            f"{key} cannot be stored in MongoDB, where a record has room for 16 MiB beside its large payloads: {error}"
        ) from error
    raise error


def is_text(value: object) -> bool:
    """Whether this can be the id of anything stored: a lone surrogate is not Unicode text, and cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
