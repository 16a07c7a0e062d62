#!/usr/bin/env python3
"""Measures how soon runners do what they should: begin with queued work, and interrupt what was cancelled.

    .venv/bin/python scripts/prove_runners.py                    8 runner processes, 200 rollouts
    .venv/bin/python scripts/prove_runners.py -n 2 --rollouts 20

A store server and a fleet run in processes of their own. Times are taken by the machine's monotonic clock, which its
processes share: from before the call that enqueues (or cancels) to the agent's first line (or the exception in its
code). Measured while this process waits, and while a thread of it computes in pure Python. The exit status is 1 if a
limit is exceeded: p50 10 ms and p99 50 ms to begin, 200 ms to interrupt.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Callable

import lightning
from lightning.execution import ExecutionEvent, worker_name
from lightning.types import Rollout

BEGIN_P50_SECONDS, BEGIN_P99_SECONDS, INTERRUPT_SECONDS = 0.010, 0.050, 0.200
DEADLINE_SECONDS = 60.0


async def quick(task: object) -> None:
    """Says when it began."""
    lightning.emit_reward(time.monotonic())


async def patient(task: object) -> None:
    """Says when it was interrupted."""
    lightning.emit_reward(0.0)
    try:
        await asyncio.sleep(1000)
    finally:
        lightning.emit_reward(time.monotonic())


def patient_function(task: object) -> None:
    """The same, in a thread."""
    lightning.emit_reward(0.0)
    try:
        while True:
            time.sleep(0.01)
    finally:
        lightning.emit_reward(time.monotonic())


class Fleet:
    """Runners of one agent."""

    def __init__(self, agent: Callable[[object], object]) -> None:
        self._agent = agent

    async def __call__(self, store: lightning.LightningStore, index: int, event: ExecutionEvent) -> None:
        runner = lightning.AgentRunner(store=store, agent=self._agent, worker_id=worker_name(index))
        await runner.run(event)


class Measurement:
    """An algorithm that measures, in the program's own process."""

    def __init__(self, agent: Callable[[object], object], runners: int, rollouts: int, spin: bool) -> None:
        self.seconds: list[float] = []
        self._agent, self._runners, self._rollouts, self._spin = agent, runners, rollouts, spin
        self._over = False

    def run(self) -> list[float]:
        strategy = lightning.ClientServerExecutionStrategy(n_runners=self._runners)
        strategy.execute(self, Fleet(self._agent))
        return sorted(self.seconds)

    async def __call__(self, store: lightning.LightningStore, event: ExecutionEvent) -> None:
        while len(await store.query_workers()) < self._runners:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # their claims are on their way
        spinner = threading.Thread(target=self._compute)
        if self._spin:
            spinner.start()
        try:
            for _ in range(self._rollouts):
                await (self._begin(store) if self._agent is quick else self._interrupt(store))
        finally:
            self._over = True
            if self._spin:
                spinner.join()

    def _compute(self) -> None:
        number = 0
        while not self._over:
            number += 1

    async def _begin(self, store: lightning.LightningStore) -> None:
        started = time.monotonic()
        rollout = await store.enqueue_rollout("task")
        await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=DEADLINE_SECONDS)
        await self._note(store, rollout, started)

    async def _interrupt(self, store: lightning.LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        until = time.monotonic() + DEADLINE_SECONDS
        while not await store.query_spans(rollout.rollout_id):
            if time.monotonic() > until:
                raise TimeoutError("the agent does not begin")
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await store.update_rollout(rollout.rollout_id, status="cancelled")
        while len(await store.query_spans(rollout.rollout_id)) < 2:
            if time.monotonic() > until:
                raise TimeoutError("the agent is not interrupted")
            await asyncio.sleep(0.01)
        await self._note(store, rollout, started)

    async def _note(self, store: lightning.LightningStore, rollout: Rollout, started: float) -> None:
        then = lightning.find_final_reward(await store.query_spans(rollout.rollout_id))
        if not then:
            raise RuntimeError(f"the agent said nothing about {rollout.rollout_id}")
        self.seconds.append(then - started)


def show(name: str, seconds: list[float], limits: dict[str, float]) -> bool:
    """Print a row; returns whether it is within the limits (by name of the column)."""
    row = {
        "p50": statistics.median(seconds),
        "p99": seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))],
        "max": seconds[-1],
    }
    within = all(row[column] < limit for column, limit in limits.items())
    figures = "  ".join(f"{column} {value * 1000:7.1f} ms" for column, value in row.items())
    print(f"{name:44} {figures}  {'ok' if within else 'EXCEEDED'}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=8, help="runner processes")
    parser.add_argument("--rollouts", type=int, default=200)
    options = parser.parse_args()
    begin = {"p50": BEGIN_P50_SECONDS, "p99": BEGIN_P99_SECONDS}
    rows = [
        ("from enqueue to the agent", quick, False, begin),
        ("the same, while the algorithm computes", quick, True, begin),
        ("from cancel to the code of an async agent", patient, False, {"max": INTERRUPT_SECONDS}),
        ("from cancel to the code of a function", patient_function, False, {"max": INTERRUPT_SECONDS}),
    ]
    verdicts = []
    for name, agent, spin, limits in rows:
        rollouts = options.rollouts if agent is quick else max(options.rollouts // 10, 5)
        verdicts.append(show(name, Measurement(agent, options.n, rollouts, spin).run(), limits))
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
