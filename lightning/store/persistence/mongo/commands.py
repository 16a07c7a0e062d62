"""Commands to workers that listen on other servers.

They are notifications: a command passes through the database, is answered by the servers that there are, and deleted.
For whoever sends one to know whom to wait for, each server leaves word every few seconds that it listens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from bson import ObjectId
from pydantic import TypeAdapter
from pymongo.errors import DuplicateKeyError

from lightning.store.persistence.abc import BackendError, CommandNotice
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.documents import NEXT, ChangeTokens
from lightning.store.persistence.mongo.schema import COMMANDS, SERVERS
from lightning.types import WorkerCommand

logger = logging.getLogger(__name__)

_PRESENCE_SECONDS = 5.0
"""How often a server leaves word that it is there."""
_GONE_AFTER_SECONDS = 15.0
"""One that has not for so long is gone."""
_ANSWER_SECONDS = 2.0
"""How long to wait for answers: where servers can only look from time to time, they do so every second at least."""
_LEAVE_SECONDS = 0.5
"""How long to try to take leave."""
_FIRST_POLL_SECONDS = 0.005
_LAST_POLL_SECONDS = 0.1

_COMMAND: TypeAdapter[WorkerCommand] = TypeAdapter(WorkerCommand)


class MongoCommands:
    """The commands of a partition, for one event loop."""

    def __init__(self, connection: MongoConnection, tokens: ChangeTokens, partition: str) -> None:
        self._connection = connection
        self._tokens = tokens
        self._partition = partition
        self._commands = connection.collection(COMMANDS)
        self._servers = connection.collection(SERVERS)
        self._place = (0, 1)

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many servers this one is, from 0, as of a few seconds ago."""
        return self._place

    # --- For who sends ---

    async def send(self, command: WorkerCommand, worker_id: str | None) -> int:
        """Bring a command to workers on other servers; returns how many worker processes get it there. A server that
        does not answer in time may yet bring it."""
        others = await self._others()
        if not others:
            return 0
        token = self._tokens.next()
        key = {"partition": self._partition, "command": token}
        document = {
            "_id": key,
            "partition": self._partition,
            "change": token,
            "ordinal": NEXT,
            "worker_id": worker_id,
            "command": _COMMAND.dump_json(command),
            "received": {},
        }
        await self._connection.run(lambda: self._put(document), within=_ANSWER_SECONDS)
        try:
            received = await self._answers(key, others)
        finally:
            await self._connection.run(
                lambda: self._commands.delete_one({"_id": key}), within=_ANSWER_SECONDS
            )
        return sum(received.values())

    async def _others(self) -> set[str]:
        """The other servers that are there."""
        left = {"$subtract": ["$$NOW", int(_GONE_AFTER_SECONDS * 1000)]}
        condition = {
            "partition": self._partition,
            "_id": {"$ne": self._own_key()},
            "$expr": {"$gt": ["$seen_at", left]},
        }
        found = await self._connection.run(
            lambda: self._servers.find(condition, {"_id": 1}).to_list(), within=_ANSWER_SECONDS
        )
        return {str(document["_id"]["server"]) for document in found}

    async def _put(self, document: Document) -> None:
        with suppress(DuplicateKeyError):  # an earlier try stored it
            await self._commands.insert_one(document)

    async def _answers(self, key: Document, servers: set[str]) -> dict[str, int]:
        deadline = time.monotonic() + _ANSWER_SECONDS
        pause = _FIRST_POLL_SECONDS
        while True:
            found = await self._connection.run(lambda: self._commands.find_one({"_id": key}, {"received": 1}))
            received: dict[str, int] = {} if found is None else found["received"]
            if servers <= received.keys() or time.monotonic() >= deadline:
                return received
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    # --- For who hears ---

    async def arrive(self) -> None:
        """Leave word that this server is about to listen."""
        change = {"$currentDate": {"seen_at": True}, "$set": {"partition": self._partition}}
        await self._connection.run(
            lambda: self._servers.update_one({"_id": self._own_key()}, change, upsert=True)
        )
        others, own = await self._others(), str(self._tokens.first)
        self._place = (sum(other < own for other in others), len(others) + 1)

    async def stay(self) -> None:
        """Leave word again and again, until cancelled."""
        while True:
            await asyncio.sleep(_PRESENCE_SECONDS)
            try:
                await self.arrive()
            except BackendError as error:  # away: so are the others
                logger.warning("%s", error)

    async def leave(self) -> None:
        """It listens no more; forget also those who left without a word."""
        long_ago = {"$subtract": ["$$NOW", int(_GONE_AFTER_SECONDS * 1000)]}
        gone = {"$or": [{"_id": self._own_key()}, {"$expr": {"$lt": ["$seen_at", long_ago]}}]}
        with suppress(BackendError):  # then it is found out in a few seconds
            await self._connection.run(
                lambda: self._servers.delete_many({"partition": self._partition, **gone}),
                within=_LEAVE_SECONDS,
            )

    async def bring(self, document: Document, announce: Callable[[CommandNotice], int]) -> None:
        """Have a command that came from another server brought to the workers here, and answer."""
        notice = CommandNotice(_COMMAND.validate_json(document["command"]), document["worker_id"])
        answer = {f"received.{self._tokens.first}": announce(notice)}
        await self._connection.run(
            lambda: self._commands.update_one({"_id": document["_id"]}, {"$set": answer})
        )

    def _own_key(self) -> Document:
        first: ObjectId = self._tokens.first
        return {"partition": self._partition, "server": first}
