"""Reaching MongoDB: one client per event loop, safe settings, and patience while a primary changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pymongo
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ExecutionTimeout,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
    WTimeoutError,
)
from pymongo.uri_parser import parse_uri

from lightning.backoff import Backoff
from lightning.store.persistence.abc import BackendError, BackendFullError, BackendUnavailableError

T = TypeVar("T")
Document = dict[str, Any]
Collection = AsyncCollection[Document]

_TRY_SECONDS = 10.0
"""How long one try of an operation may take, so that a server that has fallen silent leaves time for another."""
_CLOSE_SECONDS = 2.0
"""How long closing waits for what is under way."""
_MAX_QUOTED_CHARACTERS = 300
LEAST_RETAIN_SECONDS = 60.0
"""What is recovered after a crash must not be older than what is deleted."""

_PASSING_CODES = frozenset(
    # the server is starting, stopping, electing, or was too slow: what the driver specifications call retryable
    {6, 7, 50, 64, 89, 91, 112, 134, 189, 202, 262, 317, 9001, 10107, 11600, 11602, 13435, 13436}
)
_NO_ROOM_CODE = 14031
_UNAUTHORIZED_CODE = 13
_PASSING_LABELS = ("RetryableWriteError", "RetryableError", "TransientTransactionError")


@dataclass(frozen=True)
class MongoSettings:
    """Where to keep records, and how.

    Args:
        uri: A MongoDB connection string.
        database_name: The database.
        partition_id: Which of the stores in that database this is; they see nothing of each other.
        timeout_seconds: How long an operation is tried again while MongoDB is away.
        retain_seconds: How long finished rollouts are kept; None: for ever.

    Raises:
        ValueError: One of them is not what it should be.
    """

    uri: str
    database_name: str
    partition_id: str
    timeout_seconds: float
    retain_seconds: float | None

    def __post_init__(self) -> None:
        for name in ("uri", "database_name", "partition_id"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a non-empty string, not {value!r}")
        if set(self.database_name) & set('/\\. "$*<>:|?\0') or len(self.database_name.encode()) > 63:
            raise ValueError(f"{self.database_name!r} cannot be the name of a MongoDB database")
        for name in ("timeout_seconds", "retain_seconds"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
            ):
                raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
        if self.retain_seconds is not None and self.retain_seconds < LEAST_RETAIN_SECONDS:
            raise ValueError(
                f"MongoDB retains for at least {LEAST_RETAIN_SECONDS:g} s, not {self.retain_seconds:g} s"
            )
        if not self.uri.startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("mongo_uri must start with mongodb:// or mongodb+srv://")
        self.parse()

    def parse(self) -> Document:
        """What the connection string says. An SRV name is looked up by the client, not here."""
        if not self.uri.startswith("mongodb://"):
            return {"nodelist": [], "options": {}}
        try:
            return dict(parse_uri(self.uri))
        except PyMongoError as error:
            raise ValueError(f"mongo_uri is not a MongoDB connection string: {error}") from None

    @property
    def address(self) -> str:
        """For messages: the hosts, without user and password."""
        hosts = [host if port is None else f"{host}:{port}" for host, port in self.parse()["nodelist"]]
        return ",".join(hosts) or self.uri.rpartition("@")[2].removeprefix("mongodb+srv://").partition("/")[0]


class MongoConnection:
    """The connection of one event loop.

    Writes are acknowledged when a majority of the members have them in their journals, unless the connection string
    asks for something else (`w`, `journal`). Reads go to the primary and see what it has: all that was acknowledged,
    after a change of the primary, too, and maybe what is about to be.
    """

    def __init__(self, settings: MongoSettings) -> None:
        self.settings = settings
        self._under_way: set[asyncio.Task[Any]] = set()
        options = settings.parse()["options"]
        self._client: AsyncMongoClient[Document] = AsyncMongoClient(
            settings.uri, appname=str(options.get("appname", "lightning-store"))
        )
        self._database = self._client.get_database(
            settings.database_name, read_preference=ReadPreference.PRIMARY
        )
        if not {"w", "journal"} & set(options):
            self._database = self._database.with_options(write_concern=WriteConcern(w="majority", j=True))

    def collection(self, name: str) -> Collection:
        """A collection of the database."""
        return self._database[name]

    @property
    def database(self) -> pymongo.asynchronous.database.AsyncDatabase[Document]:
        """The database itself."""
        return self._database

    async def run(self, operation: Callable[[], Awaitable[T]], *, within: float | None = None) -> T:
        """Await `operation()`, again and again while MongoDB is away.

        A caller that is cancelled leaves the operation to finish alone: the driver would drop its socket half-open.

        Args:
            operation: Is called once per try. Its first try may have had its effect although it failed: it must know.
            within: Seconds after which to give up; None: those of the settings.

        Raises:
            BackendUnavailableError: The time was up.
            BackendFullError: MongoDB has no disk space left.
            BackendError: MongoDB does not let its user do this.
        """
        task = asyncio.create_task(self.persist(operation, within=within), name="lightning-mongo")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def persist(self, operation: Callable[[], Awaitable[T]], *, within: float | None = None) -> T:
        """As `run`, for callers that are never cancelled."""
        patience = self.settings.timeout_seconds if within is None else within
        deadline = time.monotonic() + patience
        backoff = Backoff()
        while True:
            left = deadline - time.monotonic()
            try:
                with pymongo.timeout(min(max(left, 0.001), _TRY_SECONDS)):
                    return await operation()
            except PyMongoError as error:
                self._raise_if_out_of_order(error)
                if not is_passing(error):
                    raise
                delay = backoff.next_delay()
                if time.monotonic() + delay >= deadline:
                    reason = f"{type(error).__name__}: {str(error)[:_MAX_QUOTED_CHARACTERS]}"
                    raise BackendUnavailableError(
                        f"MongoDB at {self.settings.address} could not be reached, or had no primary, for "
                        f"{patience:g} s; what the call did is unknown ({reason})"
                    ) from error
            await asyncio.sleep(delay)

    def _raise_if_out_of_order(self, error: PyMongoError) -> None:
        codes = set(error_codes(error))
        if _NO_ROOM_CODE in codes:
            raise BackendFullError(f"MongoDB at {self.settings.address} has no disk space left") from error
        if _UNAUTHORIZED_CODE in codes:
            raise BackendError(
                f"MongoDB at {self.settings.address} does not let the user of the connection string do this: {error}"
            ) from error

    async def close(self) -> None:
        """Close all sockets, soon."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_CLOSE_SECONDS)
        for task in self._under_way:
            task.cancel()
        await self._client.close()


def is_passing(error: PyMongoError) -> bool:
    """Whether the same operation may succeed in a moment: MongoDB is away, is electing a primary, or was too slow."""
    if isinstance(error, (AutoReconnect, WaitQueueTimeoutError, ExecutionTimeout, WTimeoutError)):
        return True
    if error.timeout or any(map(error.has_error_label, _PASSING_LABELS)):
        return True
    return not _PASSING_CODES.isdisjoint(error_codes(error))


def error_codes(error: Exception) -> Iterator[int | None]:
    """The codes by which the server says what went wrong."""
    if isinstance(error, BulkWriteError):
        for part in (
            *error.details.get("writeErrors", ()),
            *error.details.get("writeConcernErrors", ()),
        ):
            yield part.get("code")
    elif isinstance(error, OperationFailure):
        yield error.code
