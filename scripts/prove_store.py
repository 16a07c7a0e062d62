#!/usr/bin/env python3
"""Compares the store with its model over thousands of random histories, and counts after a storm of threads.

    .venv/bin/python scripts/prove_store.py                             everything
    .venv/bin/python scripts/prove_store.py --runs 100 --only client    fewer histories, of one kind

Everything is: 2,000 histories with 120,000 steps in all on the memory store, as many through gRPC, each step
compared with `lightning.testing.model`; then 64 threads on 8 event loops for 60 seconds, on the memory store and on the
threaded one.
A difference is shown as the shortest history that leads to it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning import InMemoryLightningStore, LightningStore, LightningStoreThreaded
from lightning.testing.machine import ClientMachine, StoreMachine
from lightning.testing.stress import for_seconds, stress

RUNS_PER_BATCH = 20


@dataclass
class Tally:
    """What was done so far."""

    runs: int = 0
    steps: int = 0


def counting(machine: type[StoreMachine], tally: Tally) -> type[StoreMachine]:
    """The machine, telling `tally` of each history that it has ended."""

    class Counting(machine):  # type: ignore[misc,valid-type]
        def teardown(self) -> None:
            super().teardown()
            tally.runs += 1
            tally.steps += self.steps

    Counting.__name__ = machine.__name__
    return Counting


class MemoryMachine(StoreMachine):
    """The memory store."""

    def make_store(self) -> LightningStore:
        return InMemoryLightningStore(clock=self.clock)


class MemoryClientMachine(ClientMachine, MemoryMachine):
    """The same through gRPC."""


def histories(name: str, machine: type[StoreMachine], runs: int, steps: int, progress: Progress) -> None:
    """Run so many histories. Raises `AssertionError` for the first difference."""
    tally = Tally()
    counted = counting(machine, tally)
    batch = settings(
        max_examples=RUNS_PER_BATCH,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    wanted = runs * steps
    task = progress.add_task(f"steps, {name}", total=wanted)
    while tally.runs < runs or tally.steps < wanted:  # histories may be shorter than they might be
        run_state_machine_as_test(counted, settings=batch)
        progress.update(task, completed=min(tally.steps, wanted))
    progress.console.print(f"{name}: {tally.runs} histories, {tally.steps} steps, no difference")


def storm(name: str, store: LightningStore, seconds: float, progress: Progress) -> None:
    """Many threads at once. Raises `AssertionError` if something was lost or done twice."""
    started = time.monotonic()
    task = progress.add_task(f"threads, {name}", total=round(seconds))
    go_on = for_seconds(seconds)

    def tell(rounds: int) -> bool:
        if rounds % 20 == 0:
            progress.update(task, completed=min(round(time.monotonic() - started), round(seconds)))
        return go_on(rounds)

    try:
        report = stress(store, go_on=tell)
    finally:
        asyncio.run(store.close())
    progress.update(task, completed=round(seconds))
    progress.console.print(
        f"{name}: 64 threads on 8 event loops, {report.calls} calls, {len(report.claimed)} claims, "
        "nothing lost or repeated",
        soft_wrap=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="histories of each kind, at least")
    parser.add_argument("--steps", type=int, default=60, help="steps of a history, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the threads go on")
    parser.add_argument("--only", choices=["memory", "client", "threads"], help="just this")
    arguments = parser.parse_args()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        proofs: dict[str, list[Callable[[], None]]] = {
            "memory": [lambda: histories("memory", MemoryMachine, arguments.runs, arguments.steps, progress)],
            "client": [
                lambda: histories("client", MemoryClientMachine, arguments.runs, arguments.steps, progress)
            ],
            "threads": [
                lambda: storm("memory", InMemoryLightningStore(), arguments.seconds, progress),
                lambda: storm(
                    "threaded", LightningStoreThreaded(InMemoryLightningStore()), arguments.seconds, progress
                ),
            ],
        }
        for kind, of_kind in proofs.items():
            for prove in of_kind if arguments.only in (None, kind) else []:
                prove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
