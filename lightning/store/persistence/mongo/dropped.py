"""What is remembered of rollouts that were dropped because their time was up.

The servers delete them, not MongoDB, for what belongs to a rollout goes with it; so they know. Each leaves a mark,
which MongoDB deletes in time, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from pymongo.errors import BulkWriteError

from lightning.store.persistence.mongo.connection import Document, MongoConnection, error_codes
from lightning.store.persistence.mongo.records import DUPLICATE_KEY, is_text
from lightning.store.persistence.mongo.schema import DROPPED, META, SPANS


class MongoDropped:
    """The dropped rollouts of a partition, for one event loop."""

    def __init__(self, connection: MongoConnection, partition: str) -> None:
        self._connection = connection
        self._partition = partition
        self._marks = connection.collection(DROPPED)
        self._meta = connection.collection(META)
        self._counter = {"partition": partition, "counts": DROPPED}

    async def mark(self, rollout_ids: Sequence[str]) -> int:
        """These are about to be deleted with their spans; returns how many spans that are, of those that no other
        server has marked."""
        spans = await self._connection.run(lambda: self._spans_of(rollout_ids))
        marks = [
            {
                "_id": self._key(rollout_id),
                "partition": self._partition,
                "dropped_at": datetime.now(timezone.utc),
            }
            for rollout_id in rollout_ids
        ]
        marked_before: set[str] = set()

        async def insert() -> None:
            try:
                await self._marks.insert_many(marks, ordered=False)
            except BulkWriteError as error:
                if set(error_codes(error)) != {DUPLICATE_KEY}:
                    raise
                marked_before.update(rollout_ids[part["index"]] for part in error.details["writeErrors"])

        await self._connection.run(insert)
        return sum(count for rollout_id, count in spans.items() if rollout_id not in marked_before)

    async def unmark(self, rollout_ids: Sequence[str]) -> None:
        """These were not deleted after all."""
        keys = [self._key(rollout_id) for rollout_id in rollout_ids]
        await self._connection.run(lambda: self._marks.delete_many({"_id": {"$in": keys}}))

    async def is_marked(self, rollout_id: str) -> bool:
        """Whether this one was dropped, as far as that is remembered."""
        if not is_text(rollout_id):
            return False
        key = self._key(rollout_id)
        return await self._connection.run(lambda: self._marks.find_one({"_id": key}, {"_id": 1})) is not None

    async def count(self, rollouts: int, spans: int) -> None:
        """So many were deleted."""
        change = {"$inc": {"rollouts": rollouts, "spans": spans}}
        await self._connection.run(lambda: self._meta.update_one({"_id": self._counter}, change, upsert=True))

    async def counts(self) -> tuple[int, int]:
        """How many rollouts, and spans, were deleted so far."""
        found = await self._connection.run(lambda: self._meta.find_one({"_id": self._counter}))
        return (0, 0) if found is None else (found["rollouts"], found["spans"])

    async def _spans_of(self, rollout_ids: Sequence[str]) -> dict[str, int]:
        pipeline = [
            {"$match": {"partition": self._partition, "rollout_id": {"$in": list(rollout_ids)}}},
            {"$group": {"_id": "$rollout_id", "spans": {"$sum": "$count"}}},
        ]
        cursor = await self._connection.collection(SPANS).aggregate(pipeline)
        return {group["_id"]: group["spans"] for group in await cursor.to_list()}

    def _key(self, rollout_id: str) -> Document:
        return {"partition": self._partition, "rollout_id": rollout_id}
