"""How much there is: counted by the database, in its indexes, without reading a document but the first of the queue."""

from __future__ import annotations

from collections import Counter

from lightning.store import lifecycle
from lightning.store.persistence.abc import Totals
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.records import MongoRecords
from lightning.store.persistence.mongo.schema import RESOURCES, ROLLOUTS, SPANS, WORKERS
from lightning.store.records import RolloutRecord


async def count_totals(
    connection: MongoConnection, rollouts: MongoRecords[RolloutRecord], partition: str
) -> Totals:
    """See `Persistence.totals`."""
    groups = await _sum(
        connection,
        ROLLOUTS,
        partition,
        {"_id": {"status": "$status", "attempts": "$attempt_counts"}, "rollouts": {"$sum": 1}},
        hint="partition_1_status_1_ordinal_1_attempt_counts_1",
    )
    rollouts_by_status: Counter[str] = Counter()
    attempts_by_status: Counter[str] = Counter()
    for group in groups:
        rollouts_by_status[group["_id"]["status"]] += group["rollouts"]
        for status, attempts in group["_id"]["attempts"].items():
            attempts_by_status[status] += attempts * group["rollouts"]
    spans = await _sum(
        connection,
        SPANS,
        partition,
        {"_id": None, "spans": {"$sum": "$count"}, "size_bytes": {"$sum": "$size_bytes"}},
        hint="partition_1_count_1_size_bytes_1",
    )
    theirs = {"partition": partition}
    resources, workers = [
        await connection.run(lambda name=name: connection.collection(name).count_documents(theirs))  # type: ignore[misc]
        for name in (RESOURCES, WORKERS)
    ]
    return Totals(
        rollouts_by_status=dict(rollouts_by_status),
        attempts=attempts_by_status.total(),
        spans=sum(group["spans"] for group in spans),
        resources=resources,
        workers=workers,
        span_bytes=sum(group["size_bytes"] for group in spans),
        attempts_by_status=dict(attempts_by_status),
        queued_since=await _queued_since(connection, rollouts, partition),
    )


async def _queued_since(
    connection: MongoConnection, rollouts: MongoRecords[RolloutRecord], partition: str
) -> float | None:
    queued = {"partition": partition, "queue": {"$exists": True}}
    head = await connection.run(lambda: rollouts.collection.find_one(queued, sort=[("queue", 1)]))
    reads = await rollouts.decode_all([] if head is None else [head])
    return lifecycle.queued_since(reads[0].record) if reads else None


async def _sum(
    connection: MongoConnection, name: str, partition: str, group: Document, hint: str
) -> list[Document]:
    pipeline = [{"$match": {"partition": partition}}, {"$group": group}]

    async def aggregate() -> list[Document]:
        cursor = await connection.collection(name).aggregate(pipeline, hint=hint)
        return await cursor.to_list()

    return await connection.run(aggregate)
