"""Random histories, a few; `scripts/prove_store.py` runs thousands."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from plain_store import PlainStore

from lightning.store import InMemoryLightningStore, SQLiteLightningStore, lifecycle
from lightning.store.contract import LightningStore
from lightning.testing.machine import ClientMachine, StoreMachine

QUICK = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class MemoryMachine(StoreMachine):
    def make_store(self) -> LightningStore:
        return InMemoryLightningStore(clock=self.clock)


class MemoryClientMachine(ClientMachine, MemoryMachine):
    """Through gRPC."""


class SQLiteInMemoryMachine(StoreMachine):
    def make_store(self) -> LightningStore:
        return SQLiteLightningStore(":memory:", clock=self.clock)


class SQLiteFileMachine(StoreMachine):
    """In a file, which also drops what finished long ago, of which there is none here."""

    def make_store(self) -> LightningStore:
        folder = tempfile.TemporaryDirectory(prefix="machine-")
        self.stack.callback(folder.cleanup)  # after the store is closed
        return SQLiteLightningStore(
            Path(folder.name) / "store.db", clock=self.clock, durability="normal", retain="52w"
        )


class SQLiteClientMachine(ClientMachine, SQLiteFileMachine):
    """Through gRPC."""


class PlainMachine(StoreMachine):
    for_runners = False

    def make_store(self) -> LightningStore:
        return PlainStore(self.clock)


def test_random_histories_on_the_memory_store() -> None:
    run_state_machine_as_test(MemoryMachine, settings=QUICK)


def test_random_histories_through_the_client() -> None:
    run_state_machine_as_test(MemoryClientMachine, settings=settings(QUICK, max_examples=10))


@pytest.mark.parametrize("machine", [SQLiteInMemoryMachine, SQLiteFileMachine, SQLiteClientMachine])
def test_random_histories_on_sqlite(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=10))


def test_random_histories_on_a_foreign_store() -> None:
    run_state_machine_as_test(PlainMachine, settings=QUICK)


def test_a_broken_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_may_become", lambda record, attempt, status: True)
    search = settings(QUICK, max_examples=500, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(MemoryMachine, settings=search)
