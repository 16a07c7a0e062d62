"""Resources: a document for each version of each id, never changed."""

from __future__ import annotations

from collections.abc import Iterable

from bson import MaxKey, MinKey
from bson.errors import BSONError
from pymongo.errors import DuplicateKeyError

from lightning.store.persistence.mongo.batches import Batcher
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import (
    ChangeTokens,
    Spill,
    resources_document,
    resources_record,
)
from lightning.store.persistence.mongo.payloads import MongoPayloads
from lightning.store.persistence.mongo.records import is_text, raise_refusal
from lightning.store.persistence.mongo.schema import RESOURCES
from lightning.store.records import ResourcesRecord

_MAX_ASKED_AT_ONCE = 1000
_LARGEST_VERSION = 2**63 - 1


class MongoResources:
    """The resources of a partition, for one event loop."""

    def __init__(
        self, connection: MongoConnection, payloads: MongoPayloads, tokens: ChangeTokens, partition: str
    ) -> None:
        self._connection = connection
        self._payloads = payloads
        self._tokens = tokens
        self._partition = partition
        self._collection = connection.collection(RESOURCES)
        self._latest: Batcher[None, ResourcesRecord | None] = Batcher(
            self._find_latest, max_items=_MAX_ASKED_AT_ONCE
        )

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._latest.close()

    async def insert(self, record: ResourcesRecord) -> bool:
        """See `Persistence.insert_resources`."""
        newest = await self._newest_version(record.resources_id)
        if record.version != newest + 1:
            return False
        spill = Spill()
        document = resources_document(self._partition, record, self._tokens.next(), spill)
        await self._payloads.write(spill, RESOURCES, document["_id"])
        try:
            inserted = await self._connection.run(lambda: self._put(document))
        except (BSONError, OverflowError) as error:
            raise_refusal(error, document["_id"])
        if inserted:
            await self._payloads.confirm(spill)
        else:
            await self._payloads.discard(spill)
        return inserted

    async def _put(self, document: Document) -> bool:
        try:
            await self._collection.insert_one(document)
        except DuplicateKeyError:  # another's, or what an earlier try stored
            stored = await self._collection.find_one({"_id": document["_id"]}, {"change": 1})
            return stored is not None and bool(stored["change"] == document["change"])
        return True

    async def _newest_version(self, resources_id: str) -> int:
        newest = await self._find_newest(resources_id, {"_id": 1})
        return 0 if newest is None else int(newest["_id"]["version"])

    async def get(self, resources_id: str, version: int | None) -> ResourcesRecord | None:
        """See `Persistence.get_resources`."""
        if not is_text(resources_id):
            return None
        if version is None:
            return await self._record(await self._find_newest(resources_id))
        if not 1 <= version <= _LARGEST_VERSION:
            return None
        key = self._key(resources_id, version)
        return await self._record(await self._connection.run(lambda: self._collection.find_one({"_id": key})))

    async def get_latest(self) -> ResourcesRecord | None:
        """See `Persistence.get_latest_resources`."""
        return await self._latest.do(None)

    async def _find_latest(self, asked: list[None]) -> list[ResourcesRecord | None]:
        condition = {"partition": self._partition}
        latest = await self._record(
            await self._connection.persist(
                lambda: self._collection.find_one(condition, sort=[("ordinal", -1)])
            )
        )
        return [latest] * len(asked)

    async def find(self) -> list[ResourcesRecord]:
        """See `Persistence.find_resources`."""
        condition = {"partition": self._partition}
        documents = await self._connection.run(
            lambda: self._collection.find(condition).sort("ordinal", 1).to_list()
        )
        return await self._records(documents)

    async def _find_newest(self, resources_id: str, fields: Document | None = None) -> Document | None:
        versions = {"$gt": self._key(resources_id, MinKey()), "$lt": self._key(resources_id, MaxKey())}
        return await self._connection.run(
            lambda: self._collection.find_one({"_id": versions}, fields, sort=[("_id", -1)])
        )

    def _key(self, resources_id: str, version: object) -> Document:
        return {"partition": self._partition, "resources_id": resources_id, "version": version}

    async def _record(self, document: Document | None) -> ResourcesRecord | None:
        return None if document is None else (await self._records([document]))[0]

    async def _records(self, documents: Iterable[Document]) -> list[ResourcesRecord]:
        return [resources_record(document, await self._payloads.contents(document)) for document in documents]
