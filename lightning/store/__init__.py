"""The LightningStore: its contract, its engine and its backends."""

from __future__ import annotations

from lightning.store.backends import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.contract import LightningStore
from lightning.store.mongo import MongoLightningStore
from lightning.store.threaded import LightningStoreThreaded

__all__ = [
    "InMemoryLightningStore",
    "LightningStore",
    "LightningStoreThreaded",
    "MongoLightningStore",
    "SQLiteLightningStore",
]
