#!/usr/bin/env python3
"""Kills a store server with SIGKILL again and again while clients work on it, and counts what became of their calls.

    .venv/bin/python scripts/prove_sqlite.py                                  100 kills, 8 clients
    .venv/bin/python scripts/prove_sqlite.py --rollouts 100000 --spans 1000000   … on a file that holds so much

Clients repeat a call whose answer was lost, so every one of them must have happened exactly once: nothing that was
acknowledged may be missing, nothing may be there twice, no rollout may be claimed twice or be stuck, SQLite must find
the file sound, and the server must answer again within a second. Exits with 1 if any of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lightning import (
    EnqueueRolloutRequest,
    LightningStore,
    LightningStoreClient,
    PromptTemplate,
    Span,
    SQLiteLightningStore,
)

RETRY_DELAYS_SECONDS = (0.1,) * 300
MOST_RESTART_SECONDS = 1.0
SPANS_PER_CALL = 64
BATCH = 1000


@dataclass
class Acknowledged:
    """What the clients were told."""

    enqueued: list[str] = field(default_factory=list)
    claimed: list[tuple[str, str]] = field(default_factory=list)
    spans: dict[str, set[str]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    restarts_seconds: list[float] = field(default_factory=list)


# --- The server ------------------------------------------------------------------------------------------------


class Server:
    """`lightning store` in a process of its own."""

    def __init__(self, backend: str, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._command = ["-m", "lightning", "store", "--backend", backend, "--port", str(port)]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> float:
        """Returns how long it took until it answered a call, in seconds."""
        began = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._command, stdout=asyncio.subprocess.DEVNULL
        )
        client = LightningStoreClient(self.address, retry_delays=(0.01,) * 1000)
        await client.statistics()
        await client.close()
        return time.monotonic() - began

    async def kill(self) -> None:
        """As `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """In peace."""
        assert self._process is not None
        self._process.terminate()
        assert await self._process.wait() == 0, "the server did not end well"


# --- The clients -----------------------------------------------------------------------------------------------


def make_spans(rollout_id: str, attempt_id: str, count: int) -> list[Span]:
    return [
        Span(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=0,
            trace_id="1".rjust(32, "0"),
            span_id=os.urandom(8).hex(),
            name="step",
            attributes={"text": "x" * 800},
        )
        for _ in range(count)
    ]


async def work(name: str, address: str, told: Acknowledged, enough: asyncio.Event) -> None:
    dice = random.Random(name)
    client = LightningStoreClient(address, retry_delays=RETRY_DELAYS_SECONDS)
    while not enough.is_set():
        enqueued = await client.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input={"by": name}) for _ in range(dice.randrange(1, 4))]
        )
        told.enqueued.extend(rollout.rollout_id for rollout in enqueued)
        for rollout in await client.dequeue_many_rollouts(limit=len(enqueued), worker_id=name):
            key = (rollout.rollout_id, rollout.attempt.attempt_id)
            told.claimed.append(key)
            for count in dice.choice([(1,), (4, 4), (SPANS_PER_CALL,)]):
                spans = make_spans(*key, count)
                await client.add_many_spans(spans)
                told.spans.setdefault(key[0], set()).update(span.span_id for span in spans)
            step = dice.randrange(1000)
            await client.update_rollout(key[0], metadata={"step": step})
            told.steps[key[0]] = step
            if dice.random() < 0.1:
                prompt = PromptTemplate(template=name, engine="f-string")
                told.published.append((await client.add_resources({"prompt": prompt})).resources_id)
            await client.update_attempt(*key, status="succeeded")
            told.finished.add(key[0])
    await client.close()


async def run(server: Server, kills: int, clients: int, told: Acknowledged) -> None:
    dice = random.Random(kills)
    enough = asyncio.Event()
    await server.start()
    working = [asyncio.create_task(work(f"client-{i}", server.address, told, enough)) for i in range(clients)]
    for number in range(kills):
        await asyncio.sleep(dice.uniform(0.2, 1.0))
        await server.kill()
        told.restarts_seconds.append(await server.start())
        if (number + 1) % 10 == 0:
            print(
                f"{number + 1} kills, {len(told.enqueued)} rollouts, {len(told.finished)} finished",
                flush=True,
            )
    enough.set()
    await asyncio.gather(*working)
    await server.stop()


# --- Before and after ------------------------------------------------------------------------------------------


async def fill(path: Path, rollouts: int, spans: int) -> None:
    """Store so many finished rollouts, and so many spans spread over them."""
    store = SQLiteLightningStore(path, durability="normal")
    requests = [EnqueueRolloutRequest(input={"text": "x" * 200}) for _ in range(BATCH)]
    for start in range(0, rollouts, BATCH):
        await store.enqueue_many_rollouts(requests[: rollouts - start])
        claimed = await store.dequeue_many_rollouts(limit=BATCH)
        keys = [(rollout.rollout_id, rollout.attempt.attempt_id) for rollout in claimed]
        await asyncio.gather(*(store.add_many_spans(make_spans(*key, spans // rollouts)) for key in keys))
    await store.close()


async def judge(store: LightningStore, told: Acknowledged, filled: int) -> list[str]:
    """What is not as it should be in the store, which is closed then."""
    wrong: list[str] = []

    def check(good: bool, complaint: str) -> None:
        if not good:
            wrong.append(complaint)

    stored = {rollout.rollout_id: rollout for rollout in await store.query_rollouts(offset=filled)}
    lost = set(told.enqueued) - stored.keys()
    check(not lost, f"{len(lost)} acknowledged rollouts are missing")
    check(
        len(stored) == len(told.enqueued), f"{len(stored)} rollouts, but {len(told.enqueued)} were enqueued"
    )
    twice = [
        name for name, count in Counter(rollout_id for rollout_id, _ in told.claimed).items() if count > 1
    ]
    check(not twice, f"{len(twice)} rollouts were claimed twice")
    left = {name for name in stored.keys() - told.finished if stored[name].status != "queuing"}
    check(not left, f"{len(left)} rollouts are stuck")
    for rollout_id, attempt_id in told.claimed:
        attempts = [attempt.attempt_id for attempt in await store.query_attempts(rollout_id)]
        check(attempts == [attempt_id], f"{rollout_id} has attempts {attempts}, not {attempt_id}")
        check(stored[rollout_id].status == "succeeded", f"{rollout_id} is {stored[rollout_id].status}")
        check(stored[rollout_id].metadata == {"step": told.steps[rollout_id]}, f"{rollout_id} lost an update")
        spans = [span.span_id for span in await store.query_spans(rollout_id)]
        check(len(spans) == len(set(spans)), f"{rollout_id} has spans twice")
        check(set(spans) == told.spans[rollout_id], f"{rollout_id} has other spans than acknowledged")
    for resources_id in told.published:
        check(await store.get_resources_by_id(resources_id) is not None, f"{resources_id} is missing")
    total = (await store.query_resources()).total
    check(total == len(told.published), f"{total} resources, but {len(told.published)} were published")
    await store.close()
    return wrong


def judge_file(path: Path, told: Acknowledged) -> list[str]:
    """What is not as it should be with the file, and with how long a server took to open it."""
    connection = sqlite3.connect(path)
    (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
    connection.close()
    wrong = [] if sound == "ok" else [f"integrity check: {sound}"]
    slowest = max(told.restarts_seconds, default=0.0)
    if slowest > MOST_RESTART_SECONDS:
        wrong.append(f"a restart took {slowest:.2f} s")
    return wrong


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=0, help="finished ones in the file from the start")
    parser.add_argument("--spans", type=int, default=0, help="of these, in all")
    parser.add_argument("--port", type=int, default=14747)
    given = parser.parse_args()
    told = Acknowledged()
    with tempfile.TemporaryDirectory(prefix="prove-sqlite-") as folder:
        path = Path(folder) / "store.db"
        if given.rollouts:
            asyncio.run(fill(path, given.rollouts, given.spans))
            print(
                f"{given.rollouts} rollouts in {path.stat().st_size / 1e6:.0f} MB to begin with", flush=True
            )
        asyncio.run(run(Server(f"sqlite:{path}", given.port), given.kills, given.clients, told))
        wrong = asyncio.run(judge(SQLiteLightningStore(path), told, given.rollouts))
        wrong += judge_file(path, told)
    print(summary(told))
    return verdict(wrong)


def summary(told: Acknowledged) -> str:
    """How much was done."""
    restarts = sorted(told.restarts_seconds)
    return (
        f"{len(restarts)} kills; acknowledged: {len(told.enqueued)} rollouts, {len(told.claimed)} claims, "
        f"{sum(map(len, told.spans.values()))} spans, {len(told.published)} resources; restart to first answer: "
        f"median {restarts[len(restarts) // 2]:.2f} s, slowest {restarts[-1]:.2f} s"
    )


def verdict(wrong: list[str]) -> int:
    """Say what is wrong; returns the exit code."""
    for complaint in wrong[:20]:
        print("WRONG:", complaint)
    print("nothing lost, nothing twice" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
