"""The part of `suite_by_tls.py` that every run of the tests has."""

from __future__ import annotations

from suite_by_tls import OnForeign, OnMemory, OnSQLite

from lightning.testing.contract import (
    AttemptContract,
    QueueContract,
    ResourcesContract,
    RolloutContract,
    SpanContract,
    WaitingContract,
    WatchContract,
)


class TestMemoryByTlsInPart(OnMemory, QueueContract, AttemptContract, ResourcesContract, WaitingContract):
    """Over memory."""


class TestSQLiteByTlsInPart(OnSQLite, SpanContract, WatchContract):
    """Over SQLite."""


class TestForeignByTlsInPart(OnForeign, RolloutContract):
    """Over a store that is none of the family."""
