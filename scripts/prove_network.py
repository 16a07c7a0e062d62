#!/usr/bin/env python3
"""Kills servers, cuts connections and makes hostile requests, and counts what became of everybody's work.

    .venv/bin/python scripts/prove_network.py                         everything, about a quarter of an hour
    .venv/bin/python scripts/prove_network.py --only kills --kills 5  one part, shorter

Everything is: a server on SQLite, killed with SIGKILL 50 times while 8 clients stream spans to it, after which nothing
that was acknowledged may be missing or there twice; 10 minutes of work over connections that are cut several times a
second, and delayed, doubled and overtaken by later ones meanwhile, in which everything must happen exactly once; 20,000
malformed and hostile requests, each of which must get a clear status while an honest client is served and the server's
memory stays flat; a task input of 16 MB, a query of 100 MB of spans, one wait for 10,000 rollouts, and a burst of 4,000
connections; the contract suite by mutual TLS with a token over memory, SQLite and a foreign store.
Exits with 1 if any of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from lightning import (
    EnqueueRolloutRequest,
    InMemoryLightningStore,
    LightningStoreClient,
    LightningStoreServer,
)
from lightning.testing import make_span
from lightning.testing.cuts import Endured, work_through_cuts
from lightning.testing.hostile import attack
from lightning.testing.kills import server_process, stream_through_kills

MOST_GROWTH_BYTES = 64 * 1024 * 1024
MOST_COPIES = 3
"""How often a client may hold what it asked for: as it came, and as it is returned."""
REQUESTS_PER_ROUND = 2000


async def prove_kills(kills: int) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        streamed = await stream_through_kills(Path(folder) / "store.db", kills=kills)
    print(
        f"kills: {streamed.kills} of a server on SQLite under 8 clients, {streamed.acknowledged} spans acknowledged, "
        f"{streamed.lost} lost, {streamed.doubled} doubled, {streamed.disordered} rollouts out of order "
        f"({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return streamed.sound


async def prove_cuts(seconds: float) -> bool:
    began = time.monotonic()
    rounds: list[Endured] = []
    while time.monotonic() - began < seconds:
        store = InMemoryLightningStore()
        server = LightningStoreServer(store, port=0)
        await server.start()
        seed = len(rounds) + 1
        rounds.append(await work_through_cuts(store, server.port, seed=seed, calls=100, cuts=20))
        await server.close()
    wrong = [mistake for endured in rounds for mistake in endured.wrong]
    cuts, duplicated, straggled, rollouts, events = (
        sum(getattr(endured, name) for endured in rounds)
        for name in ("cuts", "duplicated", "straggled", "rollouts", "events")
    )
    print(
        f"cuts: {cuts} times of all connections, {duplicated} connections doubled, {straggled} pieces of data after "
        f"their time, all delayed; {rollouts} rollouts with 6 spans each, watched by {events} events; "
        f"{len(wrong)} wrong ({seconds:.0f} s)",
        *wrong,
        sep="\n  ",
        flush=True,
    )
    return not wrong


async def prove_hostile(requests: int) -> bool:
    began = time.monotonic()
    statuses: Counter[str] = Counter()
    unclear: list[str] = []
    served, repeated, slowest, seed, memory = 0, 0, 0.0, 0, []
    async with server_process("memory") as server:
        client = LightningStoreClient(
            server.address
        )  # stays, and with it the event loop that all of them share
        await client.wait_until_ready(60)
        while statuses.total() < requests:
            attacked = await attack(server.address, requests=min(REQUESTS_PER_ROUND, requests), seed=seed)
            seed += 1
            statuses += attacked.statuses
            unclear += attacked.unclear
            served += attacked.served
            repeated += attacked.repeated
            slowest = max(slowest, attacked.slowest_seconds)
            memory.append(psutil.Process(server.pid).memory_info().rss)
        await client.close()
    growth = memory[-1] - memory[0]
    print(
        f"hostile: {statuses.total()} requests, {dict(statuses.most_common())}, {len(unclear)} unclear, {repeated} "
        f"made again as their client had lost the status; beside them {served} honest rollouts, the slowest in "
        f"{slowest:.2f} s; the server's memory {memory[0] / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB "
        f"({time.monotonic() - began:.0f} s)",
        *sorted(set(unclear)),
        sep="\n  ",
        flush=True,
    )
    return not unclear and growth < MOST_GROWTH_BYTES


async def prove_sizes(connections: int) -> bool:
    async with server_process("memory") as server:
        client = LightningStoreClient(server.address)
        await client.wait_until_ready(60)
        rights = [await prove(client) for prove in (_large_input, _large_query, _long_wait)]
        await client.close()
        rights.append(await _burst(server.address, connections))
    return all(rights)


async def _large_input(client: LightningStoreClient) -> bool:
    text = "x" * 16 * 1024 * 1024
    rollout = await client.enqueue_rollout(text)
    found = await client.get_rollout_by_id(rollout.rollout_id)
    right = found is not None and found.input == text
    print(
        f"sizes: a task input of {len(text) / 1e6:.0f} MB {'came back' if right else 'was LOST'}", flush=True
    )
    await client.update_rollout(rollout.rollout_id, status="cancelled")
    return right


async def _large_query(client: LightningStoreClient) -> bool:
    rollout = await client.start_rollout("large")
    for number in range(100):
        await client.deliver_spans(
            [make_span(rollout, name=str(number), attributes={"text": "x" * 1_000_000})]
        )
    memory = psutil.Process()
    before = memory.memory_info().rss
    spans = await client.query_spans(rollout.rollout_id)
    grown = memory.memory_info().rss - before
    size = sum(len(span.attributes["text"]) for span in spans)
    print(f"sizes: {size / 1e6:.0f} MB of spans found; the client grew by {grown / 1e6:.0f} MB", flush=True)
    return size == 100_000_000 and grown < MOST_COPIES * size


async def _long_wait(client: LightningStoreClient) -> bool:
    made = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(10_000)])
    ids = [rollout.rollout_id for rollout in made]
    waiting = asyncio.ensure_future(client.wait_for_rollouts(rollout_ids=ids))

    async def work(worker_id: str) -> None:
        while claimed := await client.claim_rollouts(limit=100, worker_id=worker_id, timeout=0):
            for rollout in claimed:
                await client.update_attempt(rollout.rollout_id, "latest", status="succeeded")

    await asyncio.gather(*[work(f"w-{n}") for n in range(16)])
    began = time.monotonic()
    ended = await waiting
    late = time.monotonic() - began
    print(
        f"sizes: one wait for {len(ids)} rollouts returned {len(ended)}, {late:.2f} s after the last",
        flush=True,
    )
    return [rollout.rollout_id for rollout in ended] == ids


async def _burst(address: str, connections: int) -> bool:
    clients = [LightningStoreClient(address) for _ in range(connections)]
    began = time.monotonic()
    answers = await asyncio.gather(*[client.statistics() for client in clients], return_exceptions=True)
    seconds = time.monotonic() - began
    failed = Counter(str(answer)[:200] for answer in answers if isinstance(answer, BaseException))
    served = len(answers) - failed.total()
    print(
        f"sizes: {served} of {connections} connections at once were served ({seconds:.1f} s)",
        *failed.items(),
        flush=True,
    )
    for client in clients:
        await client.close()
    return not failed


async def prove_suites() -> bool:
    began = time.monotonic()
    suite = Path(__file__).parents[1] / "tests" / "store" / "suite_by_tls.py"
    pytest = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", str(suite), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await pytest.communicate()
    lines = output.decode().splitlines()
    print(
        "suites: the contract by mutual TLS with a token, over memory, SQLite and a foreign store: "
        f"{lines[-1] if lines else 'nothing'} ({time.monotonic() - began:.0f} s)",
        *[line for line in lines if line.startswith(("FAILED", "ERROR"))],
        sep="\n  ",
        flush=True,
    )
    return pytest.returncode == 0


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=["kills", "cuts", "hostile", "sizes", "suites"], help="one part (default: all)"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0, help="of work over cut connections")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=4000, help="of the burst")
    arguments = parser.parse_args()
    parts = {
        "kills": lambda: prove_kills(arguments.kills),
        "cuts": lambda: prove_cuts(arguments.seconds),
        "hostile": lambda: prove_hostile(arguments.requests),
        "sizes": lambda: prove_sizes(arguments.connections),
        "suites": prove_suites,
    }
    sound = [await prove() for name, prove in parts.items() if arguments.only in (None, name)]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
