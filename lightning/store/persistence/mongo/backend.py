"""Records in MongoDB: many servers, on many machines, work on the same ones.

A rollout with its attempts is one document, and every change is one atomic update of one document, on condition that it
still is what was read (`records`). There is no transaction anywhere, so a standalone MongoDB serves as well as a
replica set. `docs/mongodb.md` describes collections, indexes and guarantees.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

from bson import Timestamp

from lightning.store.persistence.abc import (
    Announce,
    ClaimTransition,
    Persistence,
    RolloutChange,
    RolloutTransition,
    Settlement,
    SpanTransition,
    Totals,
    WorkerTransition,
)
from lightning.store.persistence.mongo.commands import MongoCommands
from lightning.store.persistence.mongo.connection import Document, MongoConnection, MongoSettings
from lightning.store.persistence.mongo.documents import ChangeTokens, RolloutForm, WorkerForm, number
from lightning.store.persistence.mongo.dropped import MongoDropped
from lightning.store.persistence.mongo.housekeeping import MongoHousekeeping
from lightning.store.persistence.mongo.intents import MongoIntents
from lightning.store.persistence.mongo.payloads import MongoPayloads
from lightning.store.persistence.mongo.queue import MongoQueue
from lightning.store.persistence.mongo.records import MongoRecords, is_text
from lightning.store.persistence.mongo.resources import MongoResources
from lightning.store.persistence.mongo.schema import ROLLOUTS, WORKERS, prepare, write_something
from lightning.store.persistence.mongo.search import find_rollouts
from lightning.store.persistence.mongo.spans import MongoSpans
from lightning.store.persistence.mongo.totals import count_totals
from lightning.store.persistence.mongo.watch import OVERLAP_SECONDS, watch
from lightning.store.queries import RolloutQuery
from lightning.store.records import ResourcesRecord, RolloutRecord, SpanReceipt, SpanRecord, WorkerRecord
from lightning.types import WorkerCommand


class _Session:
    """All that belongs to one event loop."""

    def __init__(self, settings: MongoSettings, tokens: ChangeTokens) -> None:
        partition = settings.partition_id
        connection = MongoConnection(settings)
        payloads = MongoPayloads(connection, partition)
        form = RolloutForm(partition, settings.retain_seconds)
        self.connection = connection
        self.rollouts = MongoRecords(connection, ROLLOUTS, form, payloads, tokens)
        worker_form = WorkerForm(partition)
        self.workers = MongoRecords(connection, WORKERS, worker_form, payloads, tokens, create=WorkerRecord)
        self.commands = MongoCommands(connection, tokens, partition)
        self.queue = MongoQueue(connection, self.rollouts, partition, lambda: self.commands.place)
        self.spans = MongoSpans(connection, self.rollouts, payloads, partition)
        self.resources = MongoResources(connection, payloads, tokens, partition)
        self.intents = MongoIntents(connection, self.rollouts, partition)
        self.dropped = MongoDropped(connection, partition)
        self.housekeeping = MongoHousekeeping(connection, self.intents, self.dropped, partition)

    async def close(self) -> None:
        # those that need others come before them
        for part in (self.queue, self.spans, self.rollouts, self.workers, self.resources):
            await part.close()
        await self.connection.close()


class MongoPersistence(Persistence):
    """Keeps records in a MongoDB database.

    Args:
        settings: Which database, and how.
    """

    name = "mongodb"
    durable = True
    shared = True

    def __init__(self, settings: MongoSettings) -> None:
        self._settings = settings
        self._tokens = ChangeTokens()
        self._lock = threading.Lock()
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._closed = False

    @property
    def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the connection to MongoDB was closed")
                for other in [other for other in self._sessions if other.is_closed()]:
                    del self._sessions[other]
                session = self._sessions[loop] = _Session(self._settings, self._tokens)
        return session

    async def open(self) -> None:
        """Reach MongoDB, and make what is missing there. Where that fails, it may be called again.

        Raises:
            BackendOpenError: MongoDB cannot be reached, refuses the user, or holds what a newer version wrote.
        """
        session = self._session
        try:
            await prepare(session.connection)
        except BaseException:  # who could not open does not close, either
            del self._sessions[asyncio.get_running_loop()]
            await session.close()
            raise

    async def close(self) -> None:
        with self._lock:
            self._closed = True
            sessions, self._sessions = self._sessions, {}
        for loop, session in sessions.items():
            if loop is asyncio.get_running_loop():
                await session.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(session.close(), loop))

    async def watch(self, announce: Announce, is_awaited: Callable[[], bool]) -> None:
        session = self._session
        partition, tokens, commands = self._settings.partition_id, self._tokens, session.commands
        await commands.arrive()
        beside = [
            asyncio.create_task(work, name="lightning-mongo-upkeep")
            for work in (session.housekeeping.run(self._settings.retain_seconds), commands.stay())
        ]
        try:
            await watch(session.connection, partition, tokens, commands, announce, is_awaited)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await commands.leave()

    async def send_command(self, command: WorkerCommand, worker_id: str | None) -> int:
        return await self._session.commands.send(command, worker_id)

    # --- rollouts ---

    async def insert_rollouts(
        self, records: Sequence[RolloutRecord], settle: Settlement | None = None
    ) -> list[RolloutRecord]:
        if not records:
            return []
        session = self._session
        prepared = [await session.rollouts.prepare(record) for record in records]
        if len(prepared) == 1:
            stored = await session.rollouts.insert_prepared(prepared)
        else:
            intent = await session.intents.write([one.document for one in prepared])
            stored = await session.rollouts.insert_prepared(prepared)
            await session.intents.erase(intent)
        await self._settle(settle, [(None, record) for record, _ in stored])
        return [record for record, _ in stored]

    async def get_rollout(self, rollout_id: str) -> RolloutRecord | None:
        return await self._session.rollouts.get(rollout_id)

    async def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, RolloutRecord]:
        return await self._session.rollouts.get_many(rollout_ids)

    async def settled_revision(self) -> int:
        connection = self._session.connection
        answer = await connection.run(lambda: connection.database.command("hello"))
        return number(Timestamp(answer["localTime"] - timedelta(seconds=OVERLAP_SECONDS), 0))

    async def why_gone(self, rollout_id: str) -> str | None:
        if not await self._session.dropped.is_marked(rollout_id):
            return None
        kept = self._settings.retain_seconds
        which = "" if kept is None else f", which keeps finished ones for {kept:g} s"
        return f"it had finished, and was dropped with its spans by this store{which}"

    async def get_rollout_of_attempt(self, attempt_id: str) -> RolloutRecord | None:
        if not is_text(attempt_id):
            return None
        session = self._session
        condition = {"partition": self._settings.partition_id, "attempts.attempt_id": attempt_id}
        found = await session.connection.run(
            lambda: session.rollouts.collection.find_one(condition, {"_id": 1})
        )
        read = None if found is None else await session.rollouts.read(found["_id"]["rollout_id"])
        if read is None:
            return None
        await session.rollouts.settle(read)  # another server may have begun it this moment
        return read.record

    async def change_rollout(
        self, rollout_id: str, transition: RolloutTransition, settle: Settlement | None = None
    ) -> RolloutChange | None:
        change = await self._session.rollouts.change(rollout_id, transition)
        if change is None:
            return None
        await self._settle(settle, [change])
        return RolloutChange(*change)

    async def claim_rollouts(
        self, limit: int, transition: ClaimTransition, settle: Settlement | None = None
    ) -> list[RolloutChange]:
        changes = await self._session.queue.claim(limit, transition)
        await self._settle(settle, [(change.before, change.after) for change in changes])
        return changes

    async def _settle(
        self, settle: Settlement | None, changes: Sequence[tuple[RolloutRecord | None, RolloutRecord]]
    ) -> None:
        """Let the workers follow the rollouts that they hold.

        They are documents of their own, so two changes to a rollout may reach them in the wrong order. Whoever made one
        looks again afterwards, and makes good what the rollout has become since; so the last to do so leaves the truth.
        """
        pending = list(changes) if settle is not None else []
        while pending and settle is not None:
            held: list[RolloutRecord] = []
            by_worker: dict[str, list[WorkerTransition]] = {}
            for before, after in pending:
                workers = list(settle(before, after))
                held += [after] if workers else []
                for worker_id, transition in workers:
                    by_worker.setdefault(worker_id, []).append(transition)
            await asyncio.gather(
                *(
                    self.change_worker(worker_id, partial(_one_by_one, transitions))
                    for worker_id, transitions in by_worker.items()
                )
            )
            rollouts = self._session.rollouts
            changed = await asyncio.gather(
                *(rollouts.get_if_changed(after.rollout_id, after) for after in held)
            )
            pending = [
                (after, current) for after, current in zip(held, changed, strict=True) if current is not None
            ]

    async def find_rollouts(self, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
        session = self._session
        return await find_rollouts(session.connection, session.rollouts, self._settings.partition_id, query)

    async def queue_order(self) -> list[str]:
        return await self._session.queue.order()

    async def due_rollouts(self, now: float, limit: int) -> list[str]:
        return [key["rollout_id"] for key, _ in await self._deadlines({"$exists": True, "$lt": now}, limit)]

    async def first_deadline(self) -> float | None:
        first = await self._deadlines({"$exists": True}, 1)
        return first[0][1] if first else None

    async def _deadlines(self, condition: Document, limit: int) -> list[tuple[Document, float]]:
        session = self._session
        query = {"partition": self._settings.partition_id, "deadline": condition}
        found = await session.connection.run(
            lambda: (
                session.rollouts.collection.find(query, {"deadline": 1})
                .sort("deadline", 1)
                .limit(limit)
                .to_list()
            )
        )
        return [(document["_id"], document["deadline"]) for document in found]

    # --- spans ---

    async def append_spans(
        self,
        rollout_id: str,
        attempt_id: str,
        spans: Sequence[SpanRecord],
        transition: SpanTransition,
        settle: Settlement | None = None,
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        result = await self._session.spans.append(rollout_id, attempt_id, spans, transition)
        if result is not None:
            await self._settle(settle, [(result[0].before, result[0].after)])
        return result

    async def find_spans(self, rollout_id: str, attempt_ids: Sequence[str]) -> list[SpanRecord]:
        return await self._session.spans.find(rollout_id, attempt_ids)

    # --- resources ---

    async def insert_resources(self, record: ResourcesRecord) -> bool:
        return await self._session.resources.insert(record)

    async def get_resources(self, resources_id: str, version: int | None) -> ResourcesRecord | None:
        return await self._session.resources.get(resources_id, version)

    async def get_latest_resources(self) -> ResourcesRecord | None:
        return await self._session.resources.get_latest()

    async def find_resources(self) -> list[ResourcesRecord]:
        return await self._session.resources.find()

    # --- workers ---

    async def change_worker(self, worker_id: str, transition: WorkerTransition) -> WorkerRecord:
        change = await self._session.workers.change(worker_id, transition)
        assert change is not None
        return change[1]

    async def get_worker(self, worker_id: str) -> WorkerRecord | None:
        return await self._session.workers.get(worker_id)

    async def find_workers(self) -> list[WorkerRecord]:
        session = self._session
        condition = {"partition": self._settings.partition_id}
        documents = await session.connection.run(
            lambda: session.workers.collection.find(condition).sort("ordinal", 1).to_list()
        )
        return [read.record for read in await session.workers.decode_all(documents)]

    # --- about itself ---

    async def totals(self) -> Totals:
        session = self._session
        totals = await count_totals(session.connection, session.rollouts, self._settings.partition_id)
        dropped, spans = await session.dropped.counts()
        return replace(totals, dropped_rollouts=dropped, evicted_spans=spans)

    async def check_writable(self) -> None:
        await write_something(self._session.connection)


def _one_by_one(transitions: Sequence[WorkerTransition], worker: WorkerRecord) -> WorkerRecord:
    for transition in transitions:
        worker = transition(worker)
    return worker
