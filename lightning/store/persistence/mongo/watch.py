"""Noticing what other servers do: by a change stream, or on a standalone MongoDB by looking from time to time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bson import Timestamp
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import OperationFailure

from lightning.store import lifecycle
from lightning.store.contract import TERMINAL_ATTEMPT_STATUSES
from lightning.store.persistence.abc import (
    Announce,
    LookAgain,
    Notice,
    ResourcesNotice,
    RolloutNotice,
    UntoldNotice,
)
from lightning.store.persistence.mongo.commands import MongoCommands
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import ChangeTokens
from lightning.store.persistence.mongo.schema import COMMANDS, RESOURCES, ROLLOUTS
from lightning.store.records import Lease

_NO_CHANGE_STREAMS_CODE = 40573
"""The server is a standalone one."""
_LOOK_SECONDS = 0.1
"""How often to look where there is no change stream, as long as somebody waits."""
_IDLE_LOOK_SECONDS = 1.0
"""The same while nobody does: a worker between two calls for its commands is to get what came meanwhile."""
_UNTOLD_SECONDS = 1.0
"""How often who watches rollouts looks for changes that no index tells of: other than entering the queue and ending."""
_LOOK_SHARE = 0.1
"""Looking may take no more than this part of the time."""
OVERLAP_SECONDS = 1
"""How far back a look goes: of two changes made at once, the one with the later number may be seen first."""


async def watch(
    connection: MongoConnection,
    partition: str,
    tokens: ChangeTokens,
    commands: MongoCommands,
    announce: Announce,
    is_awaited: Callable[[], bool],
) -> None:
    """See `Persistence.watch`."""
    try:
        await _follow(connection, partition, tokens, commands, announce)
    except OperationFailure as error:
        if error.code != _NO_CHANGE_STREAMS_CODE:
            raise
    await _look_around(connection, partition, tokens, commands, announce, is_awaited)


# --- By a change stream ----------------------------------------------------------------------------------------


async def _follow(
    connection: MongoConnection,
    partition: str,
    tokens: ChangeTokens,
    commands: MongoCommands,
    announce: Announce,
) -> None:
    async with await connection.database.watch(_pipeline(partition, tokens)) as stream:
        announce(LookAgain())
        async for event in stream:
            if event["ns"]["coll"] == COMMANDS:
                await commands.bring(event["fullDocument"], announce)
                continue
            for notice in _read_event(event):
                announce(notice)


def _pipeline(partition: str, tokens: ChangeTokens) -> list[Document]:
    """Of what others change in this partition, that which somebody may wait for; without the payloads."""
    by_others = _by_others(tokens)
    updated = "updateDescription.updatedFields"
    return [
        {
            "$match": {
                "documentKey._id.partition": partition,
                "$or": [
                    {
                        "operationType": "insert",
                        "ns.coll": {"$in": [RESOURCES, COMMANDS]},
                        "fullDocument.change": by_others,
                    },
                    {
                        "operationType": "insert",
                        "ns.coll": ROLLOUTS,
                        "fullDocument.change": by_others,
                        "$or": [
                            {"fullDocument.queue": {"$exists": True}},
                            {"fullDocument.finished": {"$exists": True}},
                        ],
                    },
                    {
                        "operationType": "update",
                        "ns.coll": ROLLOUTS,
                        f"{updated}.change": by_others,
                        "$or": [
                            {f"{updated}.{field}": {"$exists": True}}
                            for field in ("queue", "finished", "changed")
                        ],
                    },
                ],
            }
        },
        {"$unset": [f"{part}.{field}" for part in ("fullDocument", updated) for field in _PAYLOAD_FIELDS]},
    ]


def _by_others(tokens: ChangeTokens) -> Document:
    return {"$not": {"$gte": tokens.first, "$lte": tokens.last}}


_PAYLOAD_FIELDS = ("input", "metadata", "config", "applied", "recent", "resources")


def _read_event(event: Document) -> Iterator[Notice]:
    key = event["documentKey"]["_id"]
    if event["ns"]["coll"] == RESOURCES:
        yield ResourcesNotice(key["resources_id"], key["version"])
    elif event["operationType"] == "insert":
        document = event["fullDocument"]
        yield _rollout_notice(key["rollout_id"], document, document["attempts"], changed=False)
    else:
        updated: dict[str, Any] = event["updateDescription"]["updatedFields"]
        attempts = [value for name, value in updated.items() if name.startswith("attempts.")]
        yield _rollout_notice(key["rollout_id"], updated, attempts, changed="changed" in updated)


def _rollout_notice(
    rollout_id: str, fields: Document, attempts: Iterable[Any], *, changed: bool
) -> RolloutNotice:
    released = tuple(
        lifecycle.Hold(
            attempt["worker_id"],
            Lease(rollout_id, attempt["attempt_id"], attempt["instance_id"]),
            attempt["status"],
        )
        for attempt in attempts
        if isinstance(attempt, dict)
        and attempt["worker_id"] is not None
        and attempt["status"] in TERMINAL_ATTEMPT_STATUSES
    )
    effects = lifecycle.Effects(
        entered_queue="queue" in fields,
        finished="finished" in fields,
        acquired=(),
        released=released,
        changed=changed,
    )
    return RolloutNotice(rollout_id, effects)


# --- By looking --------------------------------------------------------------------------------------------------


async def _look_around(
    connection: MongoConnection,
    partition: str,
    tokens: ChangeTokens,
    commands: MongoCommands,
    announce: Announce,
    is_awaited: Callable[[], bool],
) -> None:
    of_partition = {"partition": partition}
    feeds = [
        _Feed(connection, ROLLOUTS, "queue", of_partition, _ATTEMPT_FIELDS),
        _Feed(connection, ROLLOUTS, "finished", of_partition, _ATTEMPT_FIELDS),
        _Feed(connection, RESOURCES, "ordinal", of_partition, ()),
    ]
    by_others = {**of_partition, "change": _by_others(tokens)}
    sent = _Feed(connection, COMMANDS, "ordinal", by_others, ("worker_id", "command"))
    for feed in (*feeds, sent):
        await feed.start()
    announce(LookAgain())
    looked = told = time.monotonic()
    pause = _LOOK_SECONDS
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        if is_awaited() or began - looked >= _IDLE_LOOK_SECONDS:
            for feed in feeds:
                for document in await feed.news():
                    announce(_read_news(document, feed.field))
            for document in await sent.news():
                await commands.bring(document, announce)
            looked = time.monotonic()
            if looked - told >= _UNTOLD_SECONDS:
                announce(UntoldNotice())
                told = looked
            pause = max(_LOOK_SECONDS, (looked - began) / _LOOK_SHARE)


def _read_news(document: Document, field: str) -> Notice:
    key = document["_id"]
    if field == "ordinal":
        return ResourcesNotice(key["resources_id"], key["version"])
    return _rollout_notice(key["rollout_id"], {field: document[field]}, document["attempts"], changed=True)


_ATTEMPT_FIELDS = tuple(f"attempts.{name}" for name in ("attempt_id", "worker_id", "instance_id", "status"))


class _Feed:
    """Documents in the order in which they got a field that holds a time of the database's logical clock.

    Args:
        connection: The connection.
        collection: Which.
        field: That field.
        condition: Which of them; names a partition.
        fields: What to read beside it.
    """

    def __init__(
        self,
        connection: MongoConnection,
        collection: str,
        field: str,
        condition: Document,
        fields: Iterable[str],
    ) -> None:
        self.field = field
        self._connection = connection
        self._collection = connection.collection(collection)
        self._condition = condition
        self._projection = dict.fromkeys((field, *fields), 1)
        self._position = Timestamp(0, 0)
        self._seen: set[Timestamp] = set()

    async def start(self) -> None:
        """Pass over what is there already."""
        newest = await self._connection.run(
            lambda: self._find(Timestamp(0, 0)).sort(self.field, -1).limit(1).to_list()
        )
        if newest:
            self._position = newest[0][self.field]
        await self.news()

    async def news(self) -> list[Document]:
        """What came since the last call."""
        start = Timestamp(max(self._position.time - OVERLAP_SECONDS, 0), 0)
        found = await self._connection.run(lambda: self._find(start).sort(self.field, 1).to_list())
        news = [document for document in found if document[self.field] not in self._seen]
        self._seen = {document[self.field] for document in found}
        if found:
            self._position = max(self._position, found[-1][self.field])
        return news

    def _find(self, start: Timestamp) -> AsyncCursor[Document]:
        condition = {**self._condition, self.field: {"$exists": True, "$gt": start}}
        return self._collection.find(condition, self._projection)
