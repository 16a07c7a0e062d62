"""What has to be done from time to time, by whichever server gets to it; doing it twice does no harm."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta, timezone

from bson import ObjectId

from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import references
from lightning.store.persistence.mongo.intents import MongoIntents
from lightning.store.persistence.mongo.schema import PAYLOADS, ROLLOUTS, SPANS

logger = logging.getLogger(__name__)

_PERIOD_SECONDS = 10.0
_BATCH_ROLLOUTS = 100
"""How many rollouts are deleted in one step."""
_ABANDONED_AFTER_SECONDS = 3600.0
"""No call takes so long: what it wrote beside a document and did not confirm has an owner for good by then, or none."""


class MongoHousekeeping:
    """Keeps a partition in order."""

    def __init__(self, connection: MongoConnection, intents: MongoIntents, partition: str) -> None:
        self._connection = connection
        self._intents = intents
        self._partition = partition

    async def run(self, retain_seconds: float | None) -> None:
        """Do all of it, again and again."""
        period = min(_PERIOD_SECONDS, (retain_seconds or _PERIOD_SECONDS) / 2)
        while True:
            try:
                await self._intents.recover()
                await self.delete_expired()
                await self.settle_payloads()
            except Exception:
                logger.exception("housekeeping failed; trying again in %s s", period)
            await asyncio.sleep(period)

    async def delete_expired(self) -> int:
        """Delete the rollouts whose time is up, with all that belongs to them; returns how many.

        They go last, so that what a server that dies in between has left is found again.
        """
        deleted = 0
        rollouts = self._connection.collection(ROLLOUTS)
        while True:
            expired = {"partition": self._partition, "expire_at": {"$lt": datetime.now(timezone.utc)}}
            found = await self._connection.run(
                lambda expired=expired: (
                    rollouts.find(expired, {"_id": 1})  # type: ignore[misc]
                    .sort("expire_at", 1)
                    .limit(_BATCH_ROLLOUTS)
                    .to_list()
                )
            )
            if not found:
                return deleted
            keys = [document["_id"] for document in found]
            theirs = {
                "partition": self._partition,
                "rollout_id": {"$in": [key["rollout_id"] for key in keys]},
            }
            for name in (SPANS, PAYLOADS):
                collection = self._connection.collection(name)
                await self._connection.run(lambda c=collection, t=theirs: c.delete_many(t))  # type: ignore[misc]
            doomed = {"_id": {"$in": keys}, "expire_at": expired["expire_at"]}
            result = await self._connection.run(lambda doomed=doomed: rollouts.delete_many(doomed))  # type: ignore[misc]
            deleted += result.deleted_count

    async def settle_payloads(self) -> None:
        """Confirm or delete what a server wrote beside a document before it died."""
        payloads = self._connection.collection(PAYLOADS)
        before = datetime.now(timezone.utc) - timedelta(seconds=_ABANDONED_AFTER_SECONDS)
        condition = {"partition": self._partition, "unconfirmed_since": {"$lt": before}}
        found = await self._connection.run(lambda: payloads.find(condition, {"owner": 1}).to_list())
        for chunk in found:
            key = {"_id": chunk["_id"]}
            if await self._is_owned(chunk["owner"], chunk["_id"]["payload"]):
                confirmed = {"$unset": {"unconfirmed_since": ""}}
                await self._connection.run(lambda key=key, c=confirmed: payloads.update_one(key, c))  # type: ignore[misc]
            else:
                await self._connection.run(lambda key=key: payloads.delete_one(key))  # type: ignore[misc]

    async def _is_owned(self, owner: Document, payload_id: ObjectId) -> bool:
        collection = self._connection.collection(owner["collection"])
        document = await self._connection.run(lambda: collection.find_one({"_id": owner["id"]}))
        return payload_id in references(document)
