"""The collections, their indexes, and the version of both. `docs/mongodb.md` says what each index is for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from pymongo import ASCENDING, IndexModel
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from lightning.store.persistence.abc import BackendError, BackendOpenError
from lightning.store.persistence.mongo.connection import MongoConnection

VERSION = 3
_OPEN_SECONDS = 10.0
"""How long to wait for MongoDB at first. Less than later: a wrong address is the likelier reason."""
_CHECK_SECONDS = 5.0
"""How long to try to write before MongoDB is said to be unavailable: who asks wants to know, not to wait."""

_REMEMBER_DROPPED_SECONDS = 30 * 86_400
"""For so long, who asks for a rollout that was dropped is told that it was."""

ROLLOUTS = "rollouts"
SPANS = "spans"
PAYLOADS = "payloads"
RESOURCES = "resources"
WORKERS = "workers"
INTENTS = "intents"
COMMANDS = "commands"
SERVERS = "servers"
DROPPED = "dropped"
META = "meta"
_SCHEMA, _CHECK = "schema", "check"
"""The documents in `META`."""


@dataclass(frozen=True)
class _Index:
    fields: tuple[str, ...]
    unique: bool = False
    only_with: str | None = None
    """Holds just the documents that have this field."""
    seconds: int | None = None
    """After so long, by the date in the field, MongoDB deletes the document."""
    name: str | None = None
    """None: as MongoDB calls it."""

    def model(self) -> IndexModel:
        options: dict[str, Any] = {}
        if self.unique:
            options["unique"] = True
        if self.seconds is not None:
            options["expireAfterSeconds"] = self.seconds
        if self.name is not None:
            options["name"] = self.name
        if self.only_with is not None:
            options["partialFilterExpression"] = {self.only_with: {"$exists": True}}
        return IndexModel([(field, ASCENDING) for field in self.fields], **options)


INDEXES: dict[str, tuple[_Index, ...]] = {
    ROLLOUTS: (
        _Index(("partition", "ordinal")),
        _Index(("partition", "status", "ordinal", "attempt_counts")),
        _Index(("partition", "queue"), only_with="queue"),
        _Index(("partition", "deadline"), only_with="deadline"),
        _Index(("partition", "finished"), only_with="finished"),
        _Index(
            ("partition", "attempts.attempt_id"),
            unique=True,
            only_with="attempts.attempt_id",
            name="each_attempt_once",
        ),
        _Index(("partition", "expire_at"), only_with="expire_at"),
    ),
    SPANS: (
        _Index(("partition", "rollout_id", "attempt_id", "span_ids"), unique=True),
        _Index(("partition", "count", "size_bytes")),
    ),
    PAYLOADS: (
        _Index(("partition", "rollout_id"), only_with="rollout_id"),
        _Index(("partition", "unconfirmed_since"), only_with="unconfirmed_since"),
    ),
    RESOURCES: (_Index(("partition", "ordinal")),),
    WORKERS: (_Index(("partition", "ordinal")),),
    INTENTS: (_Index(("partition", "written_at")),),
    COMMANDS: (_Index(("partition", "ordinal")),),
    DROPPED: (_Index(("dropped_at",), seconds=_REMEMBER_DROPPED_SECONDS),),
    SERVERS: (_Index(("partition",)),),
}


_OBSOLETE = {ROLLOUTS: "partition_1_attempts.attempt_id_1"}
"""Indexes of earlier versions that are in the way of this one's."""
_NO_SUCH_INDEX_CODES = (26, 27)


async def prepare(connection: MongoConnection) -> None:
    """Make the collections and indexes that are missing, and check that this program understands what is there.

    Raises:
        BackendOpenError: MongoDB cannot be reached, refuses the user, or holds what a newer version wrote.
    """
    try:
        patience = min(_OPEN_SECONDS, connection.settings.timeout_seconds)
        present = await connection.run(lambda: _version(connection), within=patience)
        if present == VERSION:
            return
        if present is not None:
            await connection.run(lambda: _drop_obsolete(connection))
        for name, indexes in INDEXES.items():
            models = [index.model() for index in indexes]
            await connection.run(
                lambda name=name, models=models: connection.collection(name).create_indexes(models)  # type: ignore[misc]
            )
        await connection.run(lambda: _mark_complete(connection))
    except BackendOpenError:
        raise
    except BackendError as error:
        raise BackendOpenError(str(error)) from error
    except OperationFailure as error:
        raise BackendOpenError(
            f"MongoDB at {connection.settings.address} refuses to open the database "
            f"{connection.settings.database_name!r}: {(error.details and error.details.get('errmsg')) or error}"
        ) from error
    except PyMongoError as error:
        raise BackendOpenError(
            f"MongoDB at {connection.settings.address} cannot be opened: {error}"
        ) from error


async def _version(connection: MongoConnection) -> int | None:
    """The version of which all collections and indexes are there: a document says so."""
    found = await connection.collection(META).find_one({"_id": _SCHEMA})
    if found is not None and found["version"] > VERSION:
        raise BackendOpenError(
            f"the database {connection.settings.database_name!r} was written by a newer version of this program "
            f"(schema {found['version']}, this one knows up to {VERSION}): upgrade agent-lightning-grpc"
        )
    return None if found is None else int(found["version"])


async def _drop_obsolete(connection: MongoConnection) -> None:
    for collection, index in _OBSOLETE.items():
        try:
            await connection.collection(collection).drop_index(index)
        except OperationFailure as error:
            if error.code not in _NO_SUCH_INDEX_CODES:  # another server was quicker
                raise


async def _mark_complete(connection: MongoConnection) -> None:
    change = {"$max": {"version": VERSION}}
    with suppress(DuplicateKeyError):  # another server was quicker
        await connection.collection(META).update_one({"_id": _SCHEMA}, change, upsert=True)


async def write_something(connection: MongoConnection) -> None:
    """Write what nobody reads. Raises what any write would raise now."""
    change = {"$set": {"written_at": datetime.now(timezone.utc)}}
    await connection.run(
        lambda: connection.collection(META).update_one({"_id": _CHECK}, change, upsert=True),
        within=_CHECK_SECONDS,
    )
