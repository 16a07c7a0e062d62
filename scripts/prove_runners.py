#!/usr/bin/env python3
"""Measures how soon runners do what they should: begin with queued work, interrupt what must not go on, take over what
a dead one held; and that an agent which blocks everything is not taken for dead.

    .venv/bin/python scripts/prove_runners.py                    all rows: 8 runner processes, 200 rollouts
    .venv/bin/python scripts/prove_runners.py -n 2 --rollouts 20 --block 5
    .venv/bin/python scripts/prove_runners.py --only deadline    the rows whose names have all these words

A store server and the runners are processes of their own. Times are taken by the machine's clock, which its processes
share, from before the call that enqueues or cancels, from the deadline as the server sees it, or from the death of a
process, to the agent's first line or the exception in its code. Limits: p50 10 ms and p99 50 ms to begin, also while a
thread of the algorithm's process computes in pure Python; 200 ms to interrupt; to take over, 2 s when the dead runner's
parent sees it, and its lease and a second when only the server can.

Beside the times: what was interrupted ends as `cancelled` or `timeout`, the same runner does the next task, and no
attempt is ever executed twice. The exit status is 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import lightning
from lightning import LightningStore, RolloutConfig, Span
from lightning.execution import ExecutionEvent, worker_name
from lightning.types import AttemptedRollout

BEGIN = {"p50": 0.010, "p99": 0.050}
INTERRUPT = {"max": 0.200}
SEEN = {"max": 2.0}
TIMEOUT_SECONDS = 0.5
DEADLINE_SECONDS = 60.0
"""How long anything may take before the proof gives up."""
_POLL_SECONDS = 0.01


class ProofError(Exception):
    """What is not as it should be."""


# --- Agents, which say when something happens to them ----------------------------------------------------------------


def say(what: str) -> None:
    """Record what happens now, and where."""
    lightning.emit_reward(time.time(), attributes={"what": what, "pid": os.getpid(), "parent": os.getppid()})


async def quick(task: object) -> None:
    """Begins, and ends."""
    say("began")


async def patient(task: object) -> None:
    """Waits until it is interrupted."""
    say("began")
    try:
        await asyncio.sleep(1000)
    finally:
        say("interrupted")


def patient_function(task: object) -> None:
    """The same, in a thread."""
    say("began")
    try:
        while True:
            time.sleep(0.01)
    finally:
        say("interrupted")


async def retried(task: object, rollout: AttemptedRollout) -> None:
    """Waits until it is interrupted, at the first attempt."""
    if rollout.attempt.sequence_id == 1:
        await patient(task)
    say("began")


async def blocking(seconds: float) -> None:
    """Blocks the event loop, as no agent should."""
    say("began")
    time.sleep(seconds)  # noqa: ASYNC251 - that is the fault which is to be survived


class Fleet:
    """Runners of one agent."""

    def __init__(self, agent: Callable[..., object]) -> None:
        self._agent = agent

    async def __call__(self, store: LightningStore, index: int, event: ExecutionEvent) -> None:
        runner = lightning.AgentRunner(store=store, agent=self._agent, worker_id=worker_name(index))
        await runner.run(event)


# --- What is measured, once each -------------------------------------------------------------------------------------


async def begin(store: LightningStore) -> float:
    started = time.time()
    rollout = await store.enqueue_rollout("task")
    await succeeded(store, rollout.rollout_id)  # without looking before, which would cost the runners time
    return (await heard(store, rollout.rollout_id, "began")).at - started


async def cancel(store: LightningStore) -> float:
    rollout = await store.enqueue_rollout("task")
    await heard(store, rollout.rollout_id, "began")
    started = time.time()
    await store.update_rollout(rollout.rollout_id, status="cancelled")
    interrupted = await heard(store, rollout.rollout_id, "interrupted")
    await ended_as(store, rollout.rollout_id, "cancelled")
    return interrupted.at - started


async def run_out_of_time(store: LightningStore) -> float:
    rollout = await store.enqueue_rollout("task", config=RolloutConfig(timeout_seconds=TIMEOUT_SECONDS))
    interrupted = await heard(store, rollout.rollout_id, "interrupted")
    attempt = await ended_as(store, rollout.rollout_id, "timeout")
    return interrupted.at - (attempt.start_time + TIMEOUT_SECONDS)


@dataclass(frozen=True)
class Lease:
    """What becomes of work whose runner must be heard of within so many seconds."""

    seconds: float

    @property
    def _config(self) -> RolloutConfig:
        return RolloutConfig(
            unresponsive_seconds=self.seconds, max_attempts=2, retry_condition=["unresponsive"]
        )

    async def lose_runner(self, store: LightningStore) -> float:
        """Its parent sees it."""
        return await self._lose(store, lambda began: began.pid)

    async def lose_machine(self, store: LightningStore) -> float:
        """The runner with its parent, so that only the server can know: by its silence."""
        return await self._lose(store, lambda began: began.parent)

    async def _lose(self, store: LightningStore, victim: Callable[[Said], int]) -> float:
        rollout = await store.enqueue_rollout("task", config=self._config)
        began = await heard(store, rollout.rollout_id, "began")
        killed = time.time()
        os.kill(victim(began), signal.SIGKILL)
        again = await heard(store, rollout.rollout_id, "began", attempt=2)
        await succeeded(store, rollout.rollout_id)
        return again.at - killed

    async def freeze_runner(self, store: LightningStore) -> float:
        """It is taken for dead, its work done elsewhere; when it goes on, its agent must not."""
        rollout = await store.enqueue_rollout("task", config=self._config)
        began = await heard(store, rollout.rollout_id, "began")
        os.kill(began.pid, signal.SIGSTOP)
        try:
            await succeeded(store, rollout.rollout_id)
        finally:
            woken = time.time()
            os.kill(began.pid, signal.SIGCONT)
        interrupted = await heard(store, rollout.rollout_id, "interrupted")
        return interrupted.at - woken

    def block(self, seconds: float) -> Callable[[LightningStore], Awaitable[float]]:
        async def once(store: LightningStore) -> float:
            rollout = await store.enqueue_rollout(seconds, config=self._config)
            await store.wait_for_rollouts(
                rollout_ids=[rollout.rollout_id], timeout=seconds + DEADLINE_SECONDS
            )
            attempt = await ended_as(store, rollout.rollout_id, "succeeded")
            if attempt.sequence_id != 1:
                raise ProofError("an agent that blocked its event loop was taken for dead")
            assert attempt.end_time is not None
            return attempt.end_time - attempt.start_time

        return once


# --- Looking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Something that an agent recorded."""

    attempt_id: str
    what: str
    at: float
    pid: int
    parent: int


def _said(span: Span) -> Said:
    attributes = span.attributes
    at = lightning.find_final_reward([span])
    assert at is not None
    return Said(span.attempt_id, attributes["what"], at, attributes["pid"], attributes["parent"])


async def heard(store: LightningStore, rollout_id: str, what: str, attempt: int = 1) -> Said:
    """What the agent said in this attempt, once it has."""
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        spans = await store.query_spans(rollout_id)
        attempts = {one.attempt_id: one.sequence_id for one in await store.query_attempts(rollout_id)}
        for said in map(_said, spans):
            if said.what == what and attempts[said.attempt_id] == attempt:
                return said
        if time.monotonic() > until:
            raise ProofError(f"no agent said {what!r} in attempt {attempt} within {DEADLINE_SECONDS:.0f} s")
        await asyncio.sleep(_POLL_SECONDS)


async def ended_as(store: LightningStore, rollout_id: str, status: str) -> lightning.Attempt:
    attempt = await store.get_latest_attempt(rollout_id)
    if attempt is None or attempt.status != status:
        raise ProofError(f"the attempt ended as {attempt and attempt.status}, not as {status}")
    return attempt


async def succeeded(store: LightningStore, rollout_id: str) -> None:
    done = await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=DEADLINE_SECONDS)
    if [rollout.status for rollout in done] != ["succeeded"]:
        raise ProofError(f"the rollout ended as {[rollout.status for rollout in done]}, not as succeeded")


async def check_each_once(store: LightningStore) -> None:
    """No attempt may have been begun twice."""
    for rollout in await store.query_rollouts():
        spans = map(_said, await store.query_spans(rollout.rollout_id))
        began = Counter(said.attempt_id for said in spans if said.what == "began")
        for attempt_id, count in began.items():
            if count > 1:
                raise ProofError(f"attempt {attempt_id} was executed {count} times")


# --- Rows ------------------------------------------------------------------------------------------------------------


class Commands:
    """`lightning runner` again and again, so that there are always so many, within a `with` block."""

    def __init__(self, agent: Callable[..., object], port: int, count: int) -> None:
        agent_name = f"{Path(__file__).resolve()}:{agent.__name__}"
        self._command = [
            sys.executable,
            "-m",
            "lightning",
            "runner",
            agent_name,
            "--connect",
            f"127.0.0.1:{port}",
        ]
        self._over = threading.Event()
        self._keepers = [threading.Thread(target=self._keep) for _ in range(count)]

    def __enter__(self) -> None:
        for keeper in self._keepers:
            keeper.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for keeper in self._keepers:
            keeper.join()

    def _keep(self) -> None:
        while not self._over.is_set():
            with subprocess.Popen(
                self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                while process.poll() is None and not self._over.wait(0.1):
                    pass
                process.terminate()  # one that came too late to be told that the job is over would wait for another


@dataclass
class Row:
    """Something to measure, by the algorithm of a job, which is in this process."""

    name: str
    agent: Callable[..., object]
    once: Callable[[LightningStore], Awaitable[float]]
    limits: dict[str, float]
    count: int
    runners: int = 1
    """One alone shows that the runner whose agent was interrupted takes the next task."""
    spin: bool = False
    apart: bool = False
    """Whether each runner is started by a command of its own."""
    pause: float = 0.0
    """Seconds for a dead runner's successor to come."""
    seconds: list[float] = field(default_factory=list)
    over: bool = False

    def measure(self) -> list[float]:
        """The seconds that each time took, sorted. Raises `ProofError`."""
        fleet = Fleet(self.agent)
        if self.apart:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            with Commands(self.agent, port, self.runners):
                lightning.ClientServerExecutionStrategy("algorithm", server_port=port).execute(self, fleet)
        else:
            lightning.ClientServerExecutionStrategy(
                n_runners=self.runners, restart_budget=self.count
            ).execute(self, fleet)
        return sorted(self.seconds)

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        await self._runners_are_there(store, self.runners)
        spinner = threading.Thread(target=self._compute)
        if self.spin:
            spinner.start()
        try:
            for number in range(self.count):
                if self.apart:  # a dead one's successor has another name
                    await self._runners_are_there(store, self.runners + number)
                await asyncio.sleep(self.pause if number else 0)
                self.seconds.append(await self.once(store))
        finally:
            self.over = True
            if self.spin:
                spinner.join()
        await check_each_once(store)

    async def _runners_are_there(self, store: LightningStore, count: int) -> None:
        until = time.monotonic() + DEADLINE_SECONDS
        while len(await store.query_workers()) < count:
            if time.monotonic() > until:
                raise ProofError("the runners do not come")
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # their claims are on their way

    def _compute(self) -> None:
        number = 0
        while not self.over:
            number += 1


def rows(runners: int, rollouts: int, block_seconds: float, lease_seconds: float) -> list[Row]:
    few, deaths = max(rollouts // 10, 2), max(rollouts // 40, 1)
    lease, silent = Lease(lease_seconds), {"max": lease_seconds + 1.0}
    to_async, to_function = "to the code of an async agent", "to the code of a function"
    return [
        Row("from enqueue to the agent", quick, begin, BEGIN, rollouts, runners),
        Row("from enqueue to the agent, beside a busy thread", quick, begin, BEGIN, rollouts, runners, spin=True),
        Row(f"from cancel {to_async}", patient, cancel, INTERRUPT, few),
        Row(f"from cancel {to_function}", patient_function, cancel, INTERRUPT, few),
        Row(f"from the deadline {to_async}", patient, run_out_of_time, INTERRUPT, few),
        Row(f"from the deadline {to_function}", patient_function, run_out_of_time, INTERRUPT, few),
        Row("from a runner's death to the next attempt", retried, lease.lose_runner, SEEN, deaths, 2, pause=3.0),
        Row(
            "from a whole machine's death to the next attempt", retried, lease.lose_machine, silent, deaths, 2,
            apart=True, pause=3.0,
        ),
        Row("from a frozen runner's waking to its agent's end", retried, lease.freeze_runner, SEEN, deaths, 2),
        Row("an agent that blocks its event loop, and succeeds", blocking, lease.block(block_seconds), {}, 1),
    ]  # fmt: skip


def show(name: str, seconds: list[float], limits: dict[str, float]) -> bool:
    """Print a row; returns whether it is within the limits (by name of the column)."""
    figures = {
        "p50": statistics.median(seconds),
        "p99": seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))],
        "max": seconds[-1],
    }
    within = all(figures[column] < limit for column, limit in limits.items())
    text = "  ".join(f"{column} {value * 1000:7.1f} ms" for column, value in figures.items())
    print(f"{name:56} {text}  {'ok' if within else 'EXCEEDED'}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=8, help="runner processes, where they compete")
    parser.add_argument(
        "--rollouts", type=int, default=200, help="for the first rows; a part of it for the others"
    )
    parser.add_argument("--block", type=float, default=60.0, metavar="SECONDS", help="for the last row")
    parser.add_argument("--lease", type=float, default=3.0, metavar="SECONDS", help="unresponsive_seconds")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    options = parser.parse_args()
    chosen = [
        row
        for row in rows(options.n, options.rollouts, options.block, options.lease)
        if all(word in row.name for word in options.only)
    ]
    if not chosen:
        parser.error("no row has these words in its name")
    verdicts = []
    for row in chosen:
        try:
            verdicts.append(show(row.name, row.measure(), row.limits))
        except ProofError as error:
            print(f"{row.name:56} FAILED: {error}", flush=True)
            verdicts.append(False)
    print("load average of the last minute:", os.getloadavg()[0])
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
