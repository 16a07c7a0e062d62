"""All or none of several new rollouts, without a transaction.

What is to be inserted is first written down, as one intent; from then on it will be inserted, by this server or, if
that dies, by another. An intent larger than a document is written in parts, the first of them last: without it, the
others mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import bson
from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.records import MongoRecords
from lightning.store.persistence.mongo.schema import INTENTS
from lightning.store.records import RolloutRecord

_PART_BYTES = 8 * 1024 * 1024
_OVERDUE_AFTER_SECONDS = 15.0
"""An intent older than this is probably that of a server that died; to carry it out twice does no harm."""
_ABANDONED_AFTER_SECONDS = 3600.0
"""An intent of which the first part is not there by then never was one."""


class MongoIntents:
    """The intents of a partition, for one event loop."""

    def __init__(
        self, connection: MongoConnection, rollouts: MongoRecords[RolloutRecord], partition: str
    ) -> None:
        self._connection = connection
        self._rollouts = rollouts
        self._partition = partition
        self._collection = connection.collection(INTENTS)

    async def write(self, documents: Sequence[Document]) -> list[Document]:
        """Write down that these rollouts are to be inserted, in this order; returns what `erase` needs."""
        intent_id = ObjectId()
        parts: list[Document] = [
            {
                "_id": {"intent": intent_id, "part": index},
                "partition": self._partition,
                "written_at": datetime.now(timezone.utc),
                "rollouts": rollouts,
            }
            for index, rollouts in enumerate(_parts(documents))
        ]
        parts[0]["parts"] = len(parts)
        for part in reversed(parts):
            await self._connection.run(lambda part=part: self._put(part))  # type: ignore[misc]
        return [part["_id"] for part in parts]

    async def _put(self, part: Document) -> None:
        with suppress(DuplicateKeyError):  # an earlier try wrote it
            await self._collection.insert_one(part)

    async def erase(self, part_keys: Iterable[Document]) -> None:
        """It is carried out."""
        condition = {"_id": {"$in": list(part_keys)}}
        await self._connection.run(lambda: self._collection.delete_many(condition))

    async def recover(self) -> None:
        """Carry out what servers that died have left."""
        now = datetime.now(timezone.utc)
        overdue = {
            "partition": self._partition,
            "written_at": {"$lt": now - timedelta(seconds=_OVERDUE_AFTER_SECONDS)},
        }
        fields = {"written_at": 1, "parts": 1}
        found = await self._connection.run(
            lambda: self._collection.find(overdue, fields).sort("written_at", 1).to_list()
        )
        carried_out = set()
        for part in found:
            intent_id = part["_id"]["intent"]
            if "parts" in part:
                await self._carry_out(
                    [{"intent": intent_id, "part": index} for index in range(part["parts"])]
                )
                carried_out.add(intent_id)
        abandoned = (now - timedelta(seconds=_ABANDONED_AFTER_SECONDS)).replace(tzinfo=None)
        await self.erase(
            part["_id"]
            for part in found
            if part["_id"]["intent"] not in carried_out and part["written_at"] < abandoned
        )

    async def _carry_out(self, part_keys: list[Document]) -> None:
        for key in part_keys:
            part = await self._connection.run(
                lambda key=key: self._collection.find_one({"_id": key})  # type: ignore[misc]
            )
            if part is not None:  # parts are erased only when all was inserted
                await self._rollouts.insert_documents(part["rollouts"])
        await self.erase(part_keys)


def _parts(documents: Sequence[Document]) -> Iterator[list[Document]]:
    part: list[Document] = []
    size = 0
    for document in documents:
        document_bytes = len(bson.encode(document))
        if part and size + document_bytes > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(document)
        size += document_bytes
    yield part
