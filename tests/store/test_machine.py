"""Random histories, a few; `scripts/prove_store.py` runs thousands."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from plain_store import PlainStore

from lightning.store import InMemoryLightningStore, lifecycle
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


class PlainMachine(StoreMachine):
    for_runners = False

    def make_store(self) -> LightningStore:
        return PlainStore(self.clock)


def test_random_histories_on_the_memory_store() -> None:
    run_state_machine_as_test(MemoryMachine, settings=QUICK)


def test_random_histories_through_the_client() -> None:
    run_state_machine_as_test(MemoryClientMachine, settings=settings(QUICK, max_examples=10))


def test_random_histories_on_a_foreign_store() -> None:
    run_state_machine_as_test(PlainMachine, settings=QUICK)


def test_a_broken_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_may_become", lambda record, attempt, status: True)
    search = settings(QUICK, max_examples=500, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(MemoryMachine, settings=search)
