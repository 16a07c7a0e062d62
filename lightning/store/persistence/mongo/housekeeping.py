"""What has to be done from time to time, by whichever server gets to it; doing it twice does no harm."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime, timedelta, timezone

from bson import ObjectId, Timestamp

from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import references
from lightning.store.persistence.mongo.dropped import MongoDropped
from lightning.store.persistence.mongo.intents import MongoIntents
from lightning.store.persistence.mongo.schema import COMMANDS, PAYLOADS, ROLLOUTS, SPANS

logger = logging.getLogger(__name__)

_PERIOD_SECONDS = 10.0
_BATCH_ROLLOUTS = 100
"""How many rollouts are deleted in one step."""
_ABANDONED_AFTER_SECONDS = 3600.0
"""No call takes so long: what it wrote beside a document and did not confirm has an owner for good by then, or none."""

_FORGET_COMMANDS_SECONDS = 60.0


class MongoHousekeeping:
    """Keeps a partition in order."""

    def __init__(
        self, connection: MongoConnection, intents: MongoIntents, dropped: MongoDropped, partition: str
    ) -> None:
        self._connection = connection
        self._dropped = dropped
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
                await self._forget_commands()
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
            time_is_up = {"$lt": datetime.now(timezone.utc)}
            expired = {"partition": self._partition, "expire_at": time_is_up}
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
            deleted += await self._delete([document["_id"] for document in found], time_is_up)

    async def _delete(self, keys: list[Document], time_is_up: Document) -> int:
        rollout_ids = [key["rollout_id"] for key in keys]
        spans = await self._dropped.mark(rollout_ids)
        theirs = {"partition": self._partition, "rollout_id": {"$in": rollout_ids}}
        for name in (SPANS, PAYLOADS):
            collection = self._connection.collection(name)
            await self._connection.run(lambda c=collection: c.delete_many(theirs))  # type: ignore[misc]
        rollouts = self._connection.collection(ROLLOUTS)
        these = {"_id": {"$in": keys}}
        result = await self._connection.run(lambda: rollouts.delete_many({**these, "expire_at": time_is_up}))
        if result.deleted_count < len(keys):  # another server deleted them, or they are to be executed again
            left = await self._connection.run(lambda: rollouts.find(these, {"_id": 1}).to_list())
            await self._dropped.unmark([document["_id"]["rollout_id"] for document in left])
        await self._dropped.count(result.deleted_count, spans)
        return result.deleted_count

    async def _forget_commands(self) -> None:
        """Delete those that a server sent and died before it got its answers."""
        before = Timestamp(int(time.time() - _FORGET_COMMANDS_SECONDS), 0)
        old = {"partition": self._partition, "ordinal": {"$lt": before}}
        await self._connection.run(lambda: self._connection.collection(COMMANDS).delete_many(old))

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
