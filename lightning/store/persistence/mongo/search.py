"""`find_rollouts` as a MongoDB query."""

from __future__ import annotations

import asyncio
from typing import Any

from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.records import MongoRecords, is_text
from lightning.store.queries import Page, RolloutQuery
from lightning.store.records import RolloutRecord

_LARGEST_INTEGER = 2**63 - 1


async def find_rollouts(
    connection: MongoConnection, rollouts: MongoRecords[RolloutRecord], partition: str, query: RolloutQuery
) -> tuple[list[RolloutRecord], int]:
    """The page of the query, and how many match in all."""
    condition = _condition(partition, query)
    total, documents = await asyncio.gather(
        connection.run(lambda: rollouts.collection.count_documents(condition)),
        _page(connection, rollouts, condition, query.page),
    )
    return [read.record for read in await rollouts.decode_all(documents)], total


async def _page(
    connection: MongoConnection, rollouts: MongoRecords[RolloutRecord], condition: Document, page: Page
) -> list[Document]:
    if page.limit == 0 or page.offset > _LARGEST_INTEGER:
        return []

    def find() -> Any:
        cursor = rollouts.collection.find(condition).sort(_order(page)).skip(page.offset).allow_disk_use(True)
        return (cursor if page.limit < 0 else cursor.limit(min(page.limit, _LARGEST_INTEGER))).to_list()

    documents: list[Document] = await connection.run(find)
    return documents


def _condition(partition: str, query: RolloutQuery) -> Document:
    conditions: list[Document] = []
    if query.status_in is not None:
        conditions.append({"status": {"$in": sorted(query.status_in)}})
    if query.rollout_id_in is not None:
        keys = [
            {"partition": partition, "rollout_id": rollout_id}
            for rollout_id in dict.fromkeys(query.rollout_id_in)
            if is_text(rollout_id)
        ]
        conditions.append({"_id": {"$in": keys}})
    if query.rollout_id_contains is not None:
        part = query.rollout_id_contains
        # by position and not by a pattern: no character of it means anything
        found_at = {"$indexOfBytes": ["$_id.rollout_id", {"$literal": part}]}
        conditions.append({"$expr": {"$gte": [found_at, 0]}} if is_text(part) else {"_id": {"$in": []}})
    if not conditions:
        return {"partition": partition}
    return {"partition": partition, "$or" if query.any_suffices else "$and": conditions}


def _order(page: Page) -> list[tuple[str, int]]:
    """Missing values come first in MongoDB, too; equal ones stay in the order of creation, whatever the direction."""
    direction = -1 if page.descending else 1
    if page.sort_by is None:
        return [("ordinal", direction)]
    if page.sort_by == "rollout_id":
        return [("_id", direction)]
    return [(page.sort_by, direction), ("ordinal", 1)]
