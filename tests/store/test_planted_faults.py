"""The suite can fail: each of these faults breaks one rule of a sound store, and the tests named for it notice.

A fault is planted by patching the memory store; its tests are run in this process, by calling them.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import faults_of_records
import faults_of_work
import pytest
from planting import FAULTS, Fault, Patch

from lightning.store import InMemoryLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    ResumedWatchContract,
    RunnerContract,
)

__all__ = ["faults_of_records", "faults_of_work"]  # importing them registers them


class Suite(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract, EvictionContract):
    """All there is for the memory store."""


class ImpatientSuite(Suite):
    """With a fault planted, some calls never return."""

    deadline_seconds = 0.3


def failure_of(test: str, suite: Suite) -> BaseException | None:
    """Run one test of the suite, with all its parameters, each on a store of its own; its first failure, if any."""
    for arguments in _parametrised(getattr(suite, test)):
        try:
            asyncio.run(_run(test, suite, arguments))
        except (AssertionError, RuntimeError, TypeError, ValueError, LookupError, TimeoutError) as failure:
            return failure
        except asyncio.TimeoutError as failure:  # another one before Python 3.11
            return failure
        except pytest.fail.Exception as failure:
            if "Timeout" in str(failure):
                raise  # it hung, which is no way to notice
            return failure
    return None


async def _run(test: str, suite: Suite, arguments: dict[str, Any]) -> None:
    clock = FakeClock()
    limits = {}
    if test in vars(EvictionContract):
        limits = {
            "eviction_memory_threshold": suite.eviction_threshold_bytes,
            "safe_memory_threshold": suite.safe_threshold_bytes,
        }
    store = InMemoryLightningStore(clock=clock, **limits)
    method = getattr(suite, test)
    fixtures = {"store": store, "clock": clock}
    wanted = {name: fixtures[name] for name in inspect.signature(method).parameters if name in fixtures}
    try:
        await method(**wanted, **arguments)
    finally:
        await store.close()


def _parametrised(function: Any) -> Iterator[dict[str, Any]]:
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    choices: list[list[dict[str, Any]]] = []
    for mark in marks:
        names, values = mark.args[:2]
        if isinstance(names, str):
            choices.append([{names: value} for value in values])
        else:
            choices.append([dict(zip(names, row, strict=True)) for row in values])
    for combination in product(*choices):
        yield {name: value for choice in combination for name, value in choice.items()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_caught(fault: Fault, monkeypatch: Patch) -> None:
    fault.plant(monkeypatch)
    for test in fault.caught_by:
        assert failure_of(test, ImpatientSuite()) is not None, (
            f"{test} did not notice: {fault.plant.__name__}"
        )


def test_the_same_tests_pass_on_a_sound_store() -> None:
    for test in sorted({test for fault in FAULTS for test in fault.caught_by}):
        failure = failure_of(test, Suite())
        assert failure is None, f"{test} fails on a sound store: {failure!r}"


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 25
    assert all(fault.caught_by for fault in FAULTS)
