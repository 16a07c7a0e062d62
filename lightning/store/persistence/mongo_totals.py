"""How much there is: counted by the database, in its indexes, without reading a document."""

from __future__ import annotations

from lightning.store.persistence.abc import Totals
from lightning.store.persistence.mongo_connection import Document, MongoConnection
from lightning.store.persistence.mongo_schema import RESOURCES, ROLLOUTS, SPANS, WORKERS


async def count_totals(connection: MongoConnection, partition: str) -> Totals:
    """See `Persistence.totals`."""
    by_status = await _sum(
        connection,
        ROLLOUTS,
        partition,
        {"_id": "$status", "rollouts": {"$sum": 1}, "attempts": {"$sum": "$attempt_count"}},
        hint="partition_1_status_1_ordinal_1_attempt_count_1",
    )
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
        rollouts_by_status={group["_id"]: group["rollouts"] for group in by_status},
        attempts=sum(group["attempts"] for group in by_status),
        spans=sum(group["spans"] for group in spans),
        resources=resources,
        workers=workers,
        span_bytes=sum(group["size_bytes"] for group in spans),
    )


async def _sum(
    connection: MongoConnection, name: str, partition: str, group: Document, hint: str
) -> list[Document]:
    pipeline = [{"$match": {"partition": partition}}, {"$group": group}]

    async def aggregate() -> list[Document]:
        cursor = await connection.collection(name).aggregate(pipeline, hint=hint)
        return await cursor.to_list()

    return await connection.run(aggregate)
