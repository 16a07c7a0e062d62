#!/usr/bin/env python3
"""Two hundred runners at one store server, which die at random; then counts what became of the work.

    .venv/bin/python scripts/prove_fleet.py                      200 runners in 8 processes, for 10 minutes
    .venv/bin/python scripts/prove_fleet.py --seconds 30 --runners 40 --processes 4 --pace 0.3

Each runner has a connection of its own. Whole processes are killed (-9) and started again, with the same names for
their runners; single runners lose their connection for good in the middle of their work. The tasks take their time,
raise, hang at first until their time is up, or are cancelled. In the end:

- each rollout has ended in one terminal state, and stays in the one in which it was first seen;
- its attempts are numbered without a gap, all ended, all but the last in a way that is retried, and its state is what
  became of the last;
- no attempt was executed twice, none that succeeded was executed by nobody, and its spans are there, each once;
- the server's statistics count the same; every process has ended when it was told to.

Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from opentelemetry import trace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning import (
    AgentRunner,
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    LightningStoreClient,
    Rollout,
    RolloutConfig,
)
from lightning.testing.kills import ServerProcess, server_process
from lightning.types import Stop

PROCESS_LIFE_SECONDS, RUNNER_LIFE_SECONDS = 60.0, 120.0
"""How long one lives in the mean, before it dies."""
TASK_SECONDS, TIMEOUT_SECONDS, LEASE_SECONDS = (0.5, 7.5), 12.0, 6.0
CUSTOMERS, BATCH = 40, 10
"""So many clients each enqueue so many rollouts, wait until they have ended, and do so again."""
RAISES, HANGS, CANCELLED = 0.05, 0.02, 0.02
"""Parts of the tasks."""
MAX_ATTEMPTS = 5
END_SECONDS = 30.0
"""How long processes may take to end when they were told to."""
READERS = 16
POLL_SECONDS = 0.2
TERMINAL = {"succeeded", "failed", "cancelled"}
OPEN = {"preparing", "running"}
RETRIED = ("failed", "timeout", "unresponsive")
TRACER = trace.get_tracer("proof")


# --- The runners' side -----------------------------------------------------------------------------------------------


class Worker:
    """What the runners of one process execute. Keeps a diary that outlives a kill.

    Args:
        diary: A file; gets a line for each attempt that is begun.
    """

    def __init__(self, diary: Path) -> None:
        self._diary = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def work(self, task: dict[str, Any], rollout: AttemptedRollout) -> float:
        os.write(self._diary, f"{rollout.attempt.attempt_id}\n".encode())
        for number in range(task["spans"]):
            TRACER.start_span(f"step {number}").end()
            await asyncio.sleep(task["seconds"] / task["spans"])
        if task["ends"] == "raises":
            raise RuntimeError("as the task wants it")
        if task["ends"] == "hangs" and rollout.attempt.sequence_id == 1:
            await asyncio.Event().wait()
        return 1.0


def carry(address: str, names: list[str], diary: Path, pace: float, seed: int) -> None:
    """What a process does: be these runners, until they are told to stop."""
    logging.disable(logging.CRITICAL)  # deaths have much to say
    asyncio.run(_carry(address, names, Worker(diary), pace, random.Random(seed)))


async def _carry(address: str, names: list[str], worker: Worker, pace: float, chance: random.Random) -> None:
    await asyncio.gather(*(_keep_runner(address, name, worker, pace, chance) for name in names))


async def _keep_runner(address: str, name: str, worker: Worker, pace: float, chance: random.Random) -> None:
    while True:
        client = LightningStoreClient(address)
        runner = AgentRunner(
            store=client, agent=worker.work, worker_id=name, heartbeat_interval=LEASE_SECONDS * pace
        )
        running = asyncio.create_task(runner.run())
        await asyncio.wait({running}, timeout=chance.expovariate(1 / (RUNNER_LIFE_SECONDS * pace)))
        told = running.done()
        await client.close()  # whatever it has in hand can no longer be reported
        if told:
            return running.result()
        running.cancel()
        with suppress(asyncio.CancelledError, RuntimeError):  # the client was closed
            await running


class Fleet:
    """The processes, and their deaths."""

    def __init__(self, options: argparse.Namespace, address: str, diary: Path) -> None:
        self.kills = 0
        self._options, self._address, self._diary = options, address, diary
        self._chance = random.Random(options.seed)
        self._processes: dict[int, BaseProcess] = {}

    def start(self) -> None:
        for number in range(self._options.processes):
            self._start(number)

    def _start(self, number: int) -> None:
        names = [f"runner-{index}" for index in range(number, self._options.runners, self._options.processes)]
        arguments = (self._address, names, self._diary, self._options.pace, self._chance.getrandbits(32))
        self._processes[number] = multiprocessing.get_context("spawn").Process(target=carry, args=arguments)
        self._processes[number].start()

    @property
    def begun(self) -> int:
        """Grows with each attempt that is begun."""
        return self._diary.stat().st_size

    async def wait_for_work(self, begun: int = 0) -> None:
        """Return when more has been begun than that."""
        while self.begun <= begun:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(POLL_SECONDS)

    async def die_and_return(self) -> None:
        """Kill one after the other, until cancelled; but not before something was begun after the last death."""
        pause = PROCESS_LIFE_SECONDS * self._options.pace / self._options.processes
        while True:
            begun = self.begun
            await asyncio.sleep(pause * self._chance.uniform(0.5, 1.5))
            await self.wait_for_work(begun)
            number = self._chance.randrange(self._options.processes)
            self._processes[number].kill()
            self._processes[number].join()
            self.kills += 1
            self._start(number)

    async def stop(self, client: LightningStoreClient) -> list[str]:
        """Tell all runners to stop, again for those just born again, and wait for it; returns what is wrong then."""
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until and any(one.is_alive() for one in self._processes.values()):
            await client.send_command(Stop(reason="the proof is over"))
            await asyncio.sleep(POLL_SECONDS)
        codes = Counter(process.exitcode for process in self._processes.values())
        return [f"processes ended with {dict(codes)}"] * (codes.keys() != {0})

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()


# --- The algorithm's side --------------------------------------------------------------------------------------------


@dataclass
class Progressing:
    """What was enqueued, and how it was seen to end."""

    enqueued: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)


async def be_customers(
    client: LightningStoreClient, options: argparse.Namespace, fleet: Fleet, seen: Progressing
) -> None:
    """Enqueue and wait until the time is up, somebody has died, and all that was enqueued has ended."""
    until = time.monotonic() + options.seconds
    chance = random.Random(options.seed)
    customers = min(CUSTOMERS, max(2 * options.runners // BATCH, 2))

    async def be_customer() -> None:
        while time.monotonic() < until or not fleet.kills:
            rollouts = await client.enqueue_many_rollouts(
                [_request(chance, options.pace) for _ in range(BATCH)]
            )
            ids = [rollout.rollout_id for rollout in rollouts]
            seen.enqueued.update(ids)
            cancelling = asyncio.create_task(_cancel_some(client, chance, ids, options.pace))
            for done in await client.wait_for_rollouts(rollout_ids=ids):
                seen.ended[done.rollout_id] = done.status
            seen.ended.update(dict.fromkeys(await cancelling, "cancelled"))

    await asyncio.gather(*(be_customer() for _ in range(customers)))


def _request(chance: random.Random, pace: float) -> EnqueueRolloutRequest:
    config = RolloutConfig(
        timeout_seconds=TIMEOUT_SECONDS * pace,
        unresponsive_seconds=LEASE_SECONDS * pace,
        max_attempts=MAX_ATTEMPTS,
        retry_condition=list(RETRIED),
    )
    luck = chance.random()
    ends = "raises" if luck < RAISES else "hangs" if luck < RAISES + HANGS else "returns"
    task = {"seconds": chance.uniform(*TASK_SECONDS) * pace, "spans": chance.randint(1, 5), "ends": ends}
    return EnqueueRolloutRequest(input=task, config=config)


async def _cancel_some(
    client: LightningStoreClient, chance: random.Random, ids: list[str], pace: float
) -> list[str]:
    cancelled = []
    for rollout_id in ids:
        if chance.random() < CANCELLED:
            await asyncio.sleep(chance.uniform(0, TASK_SECONDS[1]) * pace)
            rollout = await client.get_rollout_by_id(rollout_id)
            if rollout is not None and rollout.status not in TERMINAL:
                await client.update_rollout(rollout_id, status="cancelled")
                cancelled.append(rollout_id)
    return cancelled


# --- Counting --------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """What is in the store in the end."""

    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    spans: int = 0
    retried: int = 0
    wrong: list[str] = field(default_factory=list)


async def count(client: LightningStoreClient, seen: Progressing, begun: Counter[str]) -> Count:
    found = Count()
    found.wrong += [f"attempt {key} was executed {times} times" for key, times in begun.items() if times > 1]
    rollouts = list(await client.query_rollouts())
    if {rollout.rollout_id for rollout in rollouts} != seen.enqueued or len(rollouts) != len(seen.enqueued):
        found.wrong.append(f"{len(seen.enqueued)} rollouts were enqueued, {len(rollouts)} are there")
    todo = iter(rollouts)

    async def read() -> None:
        for rollout in todo:
            await _count_rollout(client, rollout, seen, begun, found)

    await asyncio.gather(*(read() for _ in range(READERS)))
    statistics = await client.statistics()
    for name, counted in (
        ("rollouts_by_status", dict(found.statuses)),
        ("attempts_by_status", dict(found.attempts)),
        ("total_spans", found.spans),
    ):
        if statistics.get(name) != counted:
            found.wrong.append(f"the server counts {name} {statistics.get(name)}, there are {counted}")
    return found


async def _count_rollout(
    client: LightningStoreClient, rollout: Rollout, seen: Progressing, begun: Counter[str], found: Count
) -> None:
    name, attempts = rollout.rollout_id, list(await client.query_attempts(rollout.rollout_id))
    spans = list(await client.query_spans(name))
    found.statuses[rollout.status] += 1
    found.attempts.update(attempt.status for attempt in attempts)
    found.spans += len(spans)
    found.retried += len(attempts) > 1
    if rollout.status not in TERMINAL or rollout.status != seen.ended.get(name):
        found.wrong.append(f"{name} is {rollout.status}, was seen to end as {seen.ended.get(name)}")
    found.wrong += [f"{name}: {complaint}" for complaint in _complaints(rollout, attempts)]
    for attempt in attempts:
        if attempt.status != "succeeded":
            continue
        expected = [f"step {number}" for number in range(rollout.input["spans"])]
        names = [span.name for span in spans if span.attempt_id == attempt.attempt_id]
        if (
            sorted(one for one in names if one.startswith("step")) != expected
            or len(names) != len(expected) + 1
        ):
            found.wrong.append(f"{name}: its spans are {names}")
        if not begun[attempt.attempt_id]:
            found.wrong.append(f"{name}: attempt {attempt.attempt_id} succeeded and was executed by nobody")


def _complaints(rollout: Rollout, attempts: list[Attempt]) -> Iterable[str]:
    numbers = [attempt.sequence_id for attempt in attempts]
    if numbers != list(range(1, len(attempts) + 1)) or len(attempts) > MAX_ATTEMPTS:
        yield f"its attempts are numbered {numbers}"
    for attempt in attempts[:-1]:
        if attempt.status not in RETRIED:
            yield f"attempt {attempt.sequence_id} was followed by another, and is {attempt.status}"
    last = attempts[-1].status if attempts else None
    fitting = {
        "succeeded": ("succeeded",),
        "failed": RETRIED,
        # in the queue it had no attempt, or one that had ended; or it ended just when it was cancelled
        "cancelled": ("cancelled", "succeeded", *RETRIED, None),
    }
    if last not in fitting.get(rollout.status, ()):
        yield f"it is {rollout.status}, its last attempt {last}"
    if rollout.status == "failed" and len(attempts) < MAX_ATTEMPTS:
        yield f"it failed after {len(attempts)} of {MAX_ATTEMPTS} attempts"
    if any(attempt.status in OPEN or attempt.end_time is None for attempt in attempts):
        yield "an attempt is open"


# --- All of it -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def shown(console: Console, seconds: float, fleet: Fleet, seen: Progressing) -> AsyncIterator[None]:
    """A line that tells how it goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds)

        async def look() -> None:
            started = time.monotonic()
            while True:
                text = f"{len(seen.ended)} of {len(seen.enqueued)} rollouts ended, {fleet.kills} processes killed"
                progress.update(task, completed=time.monotonic() - started, description=text)
                await asyncio.sleep(0.5)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            looking.cancel()


async def prove(options: argparse.Namespace, console: Console, server: ServerProcess, diary: Path) -> bool:
    client, seen = LightningStoreClient(server.address), Progressing()
    fleet = Fleet(options, server.address, diary)
    await client.wait_until_ready(END_SECONDS)
    fleet.start()
    try:
        deaths = asyncio.create_task(fleet.die_and_return())
        async with shown(console, options.seconds, fleet, seen):
            await be_customers(client, options, fleet, seen)
        deaths.cancel()
        await asyncio.wait({deaths})
        wrong = await fleet.stop(client)
    finally:
        fleet.close()
    found = await count(client, seen, Counter(diary.read_text().split()))  # noqa: ASYNC240 - the work is done
    await client.close()
    show(console, found, fleet)
    for complaint in (*wrong, *found.wrong)[:20]:
        console.print(complaint, style="red", markup=False)
    return not wrong and not found.wrong


def show(console: Console, found: Count, fleet: Fleet) -> None:
    table = Table("what", "how many")
    table.add_row("processes killed", str(fleet.kills))
    for status, number in sorted(found.statuses.items()):
        table.add_row(f"rollouts {status}", str(number))
    table.add_row("rollouts with more than one attempt", str(found.retried))
    for status, number in sorted(found.attempts.items()):
        table.add_row(f"attempts {status}", str(number))
    table.add_row("spans", str(found.spans))
    table.add_row("not as it should be", str(len(found.wrong)))
    console.print(table)


async def run(options: argparse.Namespace, console: Console) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        diary = Path(folder) / "diary"
        diary.touch()
        async with server_process(options.backend.replace("FOLDER", folder)) as server:
            return await prove(options, console, server, diary)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for how long work is enqueued")
    parser.add_argument("--runners", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8, help="that carry them")
    parser.add_argument(
        "--pace", type=float, default=1.0, help="factor of all other times: tasks, leases, lives"
    )
    parser.add_argument("--backend", default="memory", help="as `lightning store` takes it; default: memory")
    parser.add_argument("--seed", type=int, default=0)
    return int(not asyncio.run(run(parser.parse_args(), Console())))


if __name__ == "__main__":
    sys.exit(main())
