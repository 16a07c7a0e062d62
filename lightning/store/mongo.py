"""The store over MongoDB. It needs pymongo, which the extra `mongo` brings; importing this module does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from lightning.store.clock import Clock
from lightning.store.engine import StoreEngine
from lightning.store.retention import Retention

DEFAULT_DATABASE = "lightning"
DEFAULT_PARTITION = "default"


class MongoLightningStore(StoreEngine):
    """A store in a MongoDB database, on which many servers may work at once.

    It is connected by the first call: what is in the way then raises `BackendOpenError`. Later, while MongoDB is away
    or elects a primary, calls wait; those that waited in vain raise `BackendUnavailableError`, a `ConnectionError`.

    Args:
        mongo_uri: Where MongoDB is: a connection string, such as `mongodb://host1,host2/?replicaSet=rs0`. A standalone
            server serves as well as a replica set.
        database_name: The database; it is made if there is none.
        partition_id: Stores of different partitions share the database and see nothing of each other; those of the same
            partition are one store.
        retain: How long after its end a rollout is kept, with its spans: `"7d"` (units: s, m, h, d, w), at least a
            minute. Default: for ever.
        timeout_seconds: How long a call waits for MongoDB to come back.
        validate_resources: See `StoreEngine`.
        clock: See `StoreEngine`.

    Raises:
        ImportError: pymongo is not installed.
        ValueError: One of the arguments is not what it should be.
    """

    def __init__(
        self,
        mongo_uri: str = "mongodb://localhost:27017",
        database_name: str = DEFAULT_DATABASE,
        partition_id: str = DEFAULT_PARTITION,
        *,
        retain: str | Sequence[str] | None = None,
        timeout_seconds: float = 30.0,
        validate_resources: bool = True,
        clock: Clock | None = None,
    ) -> None:
        try:
            from lightning.store.persistence.mongo.backend import MongoPersistence
            from lightning.store.persistence.mongo.connection import MongoSettings
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in ("bson", "pymongo"):
                raise
            raise ImportError(
                "MongoLightningStore needs pymongo: pip install 'agent-lightning-grpc[mongo]'", name="pymongo"
            ) from error
        retention = Retention() if retain is None else Retention.of(retain)
        if retention.size_bytes is not None:
            raise ValueError(f"a store in MongoDB retains by age, such as 7d, not by size: {retention.text}")
        settings = MongoSettings(mongo_uri, database_name, partition_id, timeout_seconds, retention.seconds)
        super().__init__(MongoPersistence(settings), clock=clock, validate_resources=validate_resources)


def open_mongo(url: str, *, retain: str | Sequence[str] | None = None) -> MongoLightningStore:
    """The store that one string names.

    Args:
        url: A MongoDB connection string. Its path names the database (by default `lightning`), and what follows a `#`
            the partition (by default `default`): `mongodb://host1,host2/experiments?replicaSet=rs0#team-a`.
        retain: See `MongoLightningStore`.

    Raises:
        ImportError: pymongo is not installed.
        ValueError: It is no connection string, or such cannot be retained.
    """
    uri, _, partition = url.partition("#")
    database = unquote(urlsplit(uri).path.removeprefix("/"))
    return MongoLightningStore(
        uri, database or DEFAULT_DATABASE, unquote(partition) or DEFAULT_PARTITION, retain=retain
    )


def without_password(url: str) -> str:
    """A connection string that may be shown; anything else as it is."""
    return re.sub(r"^(mongodb(?:\+srv)?://)[^/?#]*@", r"\1", url)
