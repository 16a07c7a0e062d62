"""Payloads too large for a document: beside it, in chunks, under an id of their own that is never used again.

They are written before the document that refers to them, marked as unconfirmed, and the mark is taken off when that
document is safely there. What a server that died in between has left is found by its mark; see `housekeeping`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from lightning.store.persistence.mongo.connection import Collection, Document, MongoConnection
from lightning.store.persistence.mongo.documents import Contents, Spill, references
from lightning.store.persistence.mongo.schema import PAYLOADS

_CHUNK_BYTES = 8 * 1024 * 1024
"""Half of the size that a MongoDB document can have."""
_CACHE_BYTES = 64 * 1024 * 1024


class PayloadGone(Exception):
    """A payload that a document refers to is not there: the document was changed since it was read."""


class MongoPayloads:
    """The payloads beside the documents of a partition. Those read last are remembered: they never change."""

    def __init__(self, connection: MongoConnection, partition: str) -> None:
        self._connection = connection
        self._partition = partition
        self._chunks: Collection = connection.collection(PAYLOADS)
        self._known: OrderedDict[ObjectId, bytes] = OrderedDict()
        self._known_bytes = 0

    async def write(
        self, spill: Spill, collection: str, owner: Any, *, rollout_id: str | None = None
    ) -> None:
        """Store what a document will refer to.

        Args:
            spill: The payloads; those written by an earlier call are not written again.
            collection: That of the document.
            owner: Its `_id`.
            rollout_id: The rollout with which they are to be deleted, if that is not the owner.
        """
        if rollout_id is None and isinstance(owner, dict):
            rollout_id = owner.get("rollout_id")
        for payload_id, data in spill.added.items():
            if payload_id in spill.written:
                continue
            for chunk in self._cut(payload_id, data, {"collection": collection, "id": owner}, rollout_id):
                await self._connection.run(lambda chunk=chunk: self._put(chunk))  # type: ignore[misc]
            spill.written.add(payload_id)

    def _cut(
        self, payload_id: ObjectId, data: bytes, owner: Document, rollout_id: str | None
    ) -> Iterator[Document]:
        for index in range(_chunk_count(len(data))):
            chunk: Document = {
                "_id": {"payload": payload_id, "index": index},
                "partition": self._partition,
                "owner": owner,
                "unconfirmed_since": datetime.now(timezone.utc),
                "data": data[index * _CHUNK_BYTES : (index + 1) * _CHUNK_BYTES],
            }
            if rollout_id is not None:
                chunk["rollout_id"] = rollout_id
            yield chunk

    async def _put(self, chunk: Document) -> None:
        with suppress(DuplicateKeyError):  # an earlier try stored it
            await self._chunks.insert_one(chunk)

    async def confirm(self, spill: Spill) -> None:
        """The document that refers to them is stored; what it referred to before and no longer does can go."""
        if spill.written:
            ids = list(_chunk_ids((payload_id, len(spill.added[payload_id])) for payload_id in spill.written))
            await self._connection.run(
                lambda: self._chunks.update_many({"_id": {"$in": ids}}, {"$unset": {"unconfirmed_since": ""}})
            )
        await self.delete(spill.replaced)

    async def discard(self, spill: Spill) -> None:
        """The document that was to refer to them is not stored."""
        await self.delete((payload_id, len(data)) for payload_id, data in spill.added.items())

    async def delete(self, payloads: Iterable[tuple[ObjectId, int]]) -> None:
        """Delete payloads, given with their sizes."""
        ids = list(_chunk_ids(payloads))
        if ids:
            await self._connection.run(lambda: self._chunks.delete_many({"_id": {"$in": ids}}))

    async def contents(self, *documents: Document) -> Contents:
        """All payloads that these documents refer to.

        Raises:
            PayloadGone: One is not there.
        """
        wanted = references(list(documents))
        return {payload_id: await self._read(payload_id, size) for payload_id, size in wanted.items()}

    async def _read(self, payload_id: ObjectId, size: int) -> bytes:
        known = self._known.get(payload_id)
        if known is not None:
            self._known.move_to_end(payload_id)
            return known
        data = b"".join([await self._read_chunk(chunk_id) for chunk_id in _chunk_ids([(payload_id, size)])])
        if size <= _CACHE_BYTES and payload_id not in self._known:
            self._known[payload_id] = data
            self._known_bytes += size
            while self._known_bytes > _CACHE_BYTES:
                _, oldest = self._known.popitem(last=False)
                self._known_bytes -= len(oldest)
        return data

    async def _read_chunk(self, chunk_id: Document) -> bytes:
        chunk = await self._connection.run(lambda: self._chunks.find_one({"_id": chunk_id}, {"data": 1}))
        if chunk is None:
            raise PayloadGone(chunk_id)
        data: bytes = chunk["data"]
        return data


def _chunk_count(size: int) -> int:
    return -(-size // _CHUNK_BYTES)


def _chunk_ids(payloads: Iterable[tuple[ObjectId, int]]) -> Iterator[Document]:
    for payload_id, size in payloads:
        for index in range(_chunk_count(size)):
            yield {"payload": payload_id, "index": index}
