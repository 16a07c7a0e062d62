#!/usr/bin/env python3
"""Several store servers on one MongoDB, real processes of both, which are killed; then counts what became of the calls.

    .venv/bin/python scripts/prove_mongo.py                     everything
    .venv/bin/python scripts/prove_mongo.py --only kills        one of: suite, kills, wakes, sharing

- suite: the contract suite and random histories, on both kinds of MongoDB, directly and through the client, also by TLS
  with a token.
- kills: a store server is killed 30 times while 8 clients work on it; see `prove_sqlite.py`.
- wakes: one server's waiters are told of what ends on another; how long that takes.
- sharing: four store servers, 64 claimers, 20,000 rollouts, on a replica set of three; in the middle the primary and a
  store server are killed. Each rollout must be claimed exactly once and get done.

Exits with 1 if anything is not as it should be. The MongoDB is that of the tests, which `scripts/setup` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pymongo

sys.path.append(str(Path(__file__).parents[1] / "tests" / "mongo"))

from prove_sqlite import (
    BATCH,
    RETRY_DELAYS_SECONDS,
    Acknowledged,
    Server,
    judge,
    run,
    summary,
    verdict,
)
from server import Mongod, free_port

from lightning import (
    EnqueueRolloutRequest,
    LightningStoreClient,
    MongoLightningStore,
    RolloutConfig,
)

KILL_CLIENTS = 8
SERVERS = 4
MOST_WAKE_SECONDS = 0.2
WAKES_IN_TIME = 0.9
"""Which part of them must be; a machine that is busy with other things delays one now and then."""


def start_mongods(stack: ExitStack, folder: Path, count: int) -> list[Mongod]:
    """A replica set."""
    servers = [Mongod(folder / f"mongod-{number}", replica_set=True) for number in range(count)]
    for server in servers:
        stack.callback(server.stop)
        server.start()
    servers[0].initiate(*servers[1:])
    return servers


def url_of(servers: list[Mongod]) -> str:
    return f"mongodb://{','.join(server.host for server in servers)}/prove?replicaSet=rs0"


def find_primary(servers: list[Mongod]) -> Mongod:
    with pymongo.MongoClient(servers[0].uri) as client:
        host = client.admin.command("hello")["primary"]
    return next(server for server in servers if server.host == host)


# --- The contract, everywhere ----------------------------------------------------------------------------------


def prove_suite() -> list[str]:
    """Tests say themselves what is wrong."""
    suite = Path(__file__).parents[1] / "tests" / "mongo" / "full_suite.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite]
    code = subprocess.run(command, check=False, cwd=suite.parents[2]).returncode
    return [f"the suite ended with {code}"] if code else []


# --- A store server is killed ----------------------------------------------------------------------------------


def prove_kills(mongods: list[Mongod], kills: int) -> list[str]:
    told = Acknowledged()
    url = url_of(mongods)
    asyncio.run(run(Server(f"{url}#kills", free_port()), kills, KILL_CLIENTS, told))
    wrong = asyncio.run(judge(MongoLightningStore(url, "prove", "kills"), told, 0))
    print(summary(told), flush=True)
    return wrong


# --- Waiters on another server ---------------------------------------------------------------------------------


async def prove_wakes(mongods: list[Mongod], wakes: int) -> list[str]:
    servers = [Server(f"{url_of(mongods)}#wakes", free_port()) for _ in range(2)]
    for server in servers:
        await server.start()
    here, there = [LightningStoreClient(server.address) for server in servers]
    seconds: list[float] = []
    for _ in range(wakes):
        rollout = await there.start_rollout("task")
        waiting = asyncio.create_task(here.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60))
        await asyncio.sleep(0.2)  # it waits by now
        await there.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
        ended = time.monotonic()
        assert len(await waiting) == 1
        seconds.append(max(0.0, time.monotonic() - ended))
    for client in (here, there):
        await client.close()
    for server in servers:
        await server.stop()
    seconds.sort()
    print(
        f"{wakes} ends on another server: waiters woke within {seconds[len(seconds) // 2] * 1000:.0f} ms (median), "
        f"{seconds[-1] * 1000:.0f} ms (slowest)",
        flush=True,
    )
    late = sum(one > MOST_WAKE_SECONDS for one in seconds)
    return [f"{late} of {wakes} waiters woke late"] if late > wakes * (1 - WAKES_IN_TIME) else []


# --- Many servers, many claimers -------------------------------------------------------------------------------


async def prove_sharing(mongods: list[Mongod], rollouts: int, claimers: int) -> list[str]:
    servers = [Server(f"{url_of(mongods)}#sharing", free_port()) for _ in range(SERVERS)]
    for server in servers:
        await server.start()
    clients = [LightningStoreClient(server.address, retry_delays=RETRY_DELAYS_SECONDS) for server in servers]
    enqueued = await _enqueue(clients, rollouts)
    claims: list[tuple[str, str]] = []
    done = asyncio.Event()

    parts_done = asyncio.Semaphore(0)
    """A share for every third of the rollouts."""

    async def work(client: LightningStoreClient, name: str) -> None:
        while not done.is_set():
            for rollout in await client.claim_rollouts(worker_id=name, timeout=1):
                key = (rollout.rollout_id, rollout.attempt.attempt_id)
                claims.append(key)
                if len(claims) % (rollouts // 3) == 0:
                    parts_done.release()
                await client.update_attempt(*key, status="succeeded")
                if len(claims) >= rollouts:
                    done.set()

    began = time.monotonic()
    tasks = [
        asyncio.create_task(work(clients[number % SERVERS], f"worker-{number}")) for number in range(claimers)
    ]
    killing = asyncio.create_task(_kill_in_the_middle(mongods, servers[-1], parts_done))
    await asyncio.gather(*tasks)
    await killing
    took = time.monotonic() - began
    print(
        f"{len(claims)} claims by {claimers} claimers on {SERVERS} servers in {took:.0f} s, the MongoDB primary "
        "and a store server killed in between",
        flush=True,
    )
    wrong = await _judge_sharing(clients[0], enqueued, claims)
    for client in clients:
        await client.close()
    for server in servers:
        await server.stop()
    return wrong


async def _enqueue(clients: list[LightningStoreClient], count: int) -> list[str]:
    config = RolloutConfig(max_attempts=1)
    enqueued: list[str] = []
    for start in range(0, count, BATCH):
        requests = [
            EnqueueRolloutRequest(input=number, config=config)
            for number in range(start, min(start + BATCH, count))
        ]
        made = await clients[start // BATCH % len(clients)].enqueue_many_rollouts(requests)
        enqueued += [rollout.rollout_id for rollout in made]
    return enqueued


async def _kill_in_the_middle(mongods: list[Mongod], server: Server, parts_done: asyncio.Semaphore) -> None:
    await parts_done.acquire()
    await asyncio.to_thread(lambda: find_primary(mongods).kill())
    print("the MongoDB primary was killed", flush=True)
    await parts_done.acquire()
    await server.kill()
    await server.start()
    print("a store server was killed, and started again", flush=True)


async def _judge_sharing(
    client: LightningStoreClient, enqueued: list[str], claims: list[tuple[str, str]]
) -> list[str]:
    wrong: list[str] = []
    counts = Counter(rollout_id for rollout_id, _ in claims)
    twice = [rollout_id for rollout_id, count in counts.items() if count > 1]
    if twice:
        wrong.append(f"{len(twice)} rollouts were claimed twice")
    if set(counts) != set(enqueued):
        wrong.append(f"{len(set(enqueued) - set(counts))} rollouts were never claimed")
    statistics = await client.statistics()
    if statistics["rollouts_by_status"] != {"succeeded": len(enqueued)}:
        wrong.append(f"of {len(enqueued)} rollouts became {statistics['rollouts_by_status']}")
    if statistics["total_attempts"] != len(enqueued):
        wrong.append(f"{len(enqueued)} rollouts have {statistics['total_attempts']} attempts")
    return wrong


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["suite", "kills", "wakes", "sharing"], help="just this")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--wakes", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=20_000, help="that are shared")
    parser.add_argument("--claimers", type=int, default=64)
    given = parser.parse_args()
    wrong: list[str] = []
    if given.only in (None, "suite"):
        wrong += prove_suite()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prove-mongo-")))
        if given.only in (None, "kills", "wakes"):
            alone = start_mongods(stack, folder / "alone", 1)
            if given.only != "wakes":
                wrong += prove_kills(alone, given.kills)
            if given.only != "kills":
                wrong += asyncio.run(prove_wakes(alone, given.wakes))
        if given.only in (None, "sharing"):
            three = start_mongods(stack, folder / "three", 3)
            wrong += asyncio.run(prove_sharing(three, given.rollouts, given.claimers))
    return verdict(wrong)


if __name__ == "__main__":
    sys.exit(main())
