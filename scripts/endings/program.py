"""A job of one rollout: the program that `prove_endings.py` starts, in whatever form, and brings to an end.

Its only argument is JSON: `kind`, `form`, `behaviour` and `store_path`; the rest are settings of the strategy.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import multiprocessing
import os
import sys
import time

import lightning
from lightning.execution import worker_name

NEVER_SECONDS = 1000


class Algorithm:
    """Hands out one task, whose name is the behaviour wanted."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    async def __call__(self, store: lightning.LightningStore, event: object) -> None:
        config = lightning.RolloutConfig(retry_condition=["unresponsive"], max_attempts=2)
        if self.behaviour == "agent hangs":
            config = lightning.RolloutConfig(timeout_seconds=2.0)
        rollout = await store.enqueue_rollout(input=self.behaviour, config=config)
        print("enqueued", rollout.rollout_id, flush=True)
        if self.behaviour == "stubborn":
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=2.0)
            print("algorithm blocks", flush=True)
            time.sleep(NEVER_SECONDS)  # noqa: ASYNC251 - that is the fault which is to be survived
        (done,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id])
        print("rollout", done.status, flush=True)
        if self.behaviour == "algorithm raises":
            raise KeyError("of the algorithm")


class Runner:
    """Does it."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    async def __call__(self, store: lightning.LightningStore, index: int, event: object) -> None:
        if self.behaviour == "runner raises":
            while not await store.query_rollouts():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)  # for the algorithm to say so
            raise RuntimeError("of the runner")
        await lightning.AgentRunner(store=store, agent=self.work, worker_id=worker_name(index)).run(event)

    async def work(self, task: str, rollout: lightning.AttemptedRollout) -> float:
        print("agent begins in", os.getpid(), flush=True)
        if task == "agent raises":
            raise LookupError("of the agent")
        if task == "agent hangs":
            while True:
                ctypes.CDLL(None).sleep(NEVER_SECONDS)
        if task == "waits" or (task == "dies" and rollout.attempt.sequence_id == 1):
            await asyncio.sleep(NEVER_SECONDS)
        if task == "stubborn":
            time.sleep(NEVER_SECONDS)  # noqa: ASYNC251
        return 1.0


def closures(behaviour: str) -> tuple[object, object]:
    """The same two as functions within a function, which can be found by no name."""
    make_algorithm, make_runner = Algorithm, Runner

    async def algorithm(store: lightning.LightningStore, event: object) -> None:
        await make_algorithm(behaviour)(store, event)

    async def runner(store: lightning.LightningStore, index: int, event: object) -> None:
        await make_runner(behaviour)(store, index, event)

    return algorithm, runner


def execute(kind: str, form: str, behaviour: str, store_path: str, **settings: object) -> None:
    print("executes in", os.getpid(), flush=True)
    algorithm, runner = Algorithm(behaviour), Runner(behaviour)
    if form == "closure":
        algorithm, runner = closures(behaviour)
    store = None
    if kind == "shm":
        strategy = lightning.SharedMemoryExecutionStrategy(**settings)
        store = lightning.SQLiteLightningStore(store_path)
    else:
        strategy = lightning.ClientServerExecutionStrategy(store_url="sqlite:" + store_path, **settings)
    strategy.execute(algorithm, runner, store)
    print("done", flush=True)


def execute_in_process(method: str, arguments: dict[str, object]) -> None:
    """In a process of multiprocessing; ends as that does, or where a signal killed it as shells say so."""
    process = multiprocessing.get_context(method).Process(target=execute, kwargs=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    sys.exit(process.exitcode if process.exitcode >= 0 else 128 - process.exitcode)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["form"] in ("spawn", "forkserver"):
        execute_in_process(given["form"], given)
    else:
        execute(**given)
