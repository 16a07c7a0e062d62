#!/usr/bin/env python3
"""Kills servers, cuts connections and makes hostile requests, and counts what became of everybody's work.

    .venv/bin/python scripts/prove_network.py                         everything, about a quarter of an hour
    .venv/bin/python scripts/prove_network.py --only kills --kills 5  one part, shorter

Everything is: a server on SQLite, killed with SIGKILL 50 times while 8 clients stream spans to it, after which nothing
that was acknowledged may be missing or there twice; 10 minutes of work over connections that are cut several times a
second, in which everything must happen exactly once; 20,000 malformed and hostile requests, each of which must get a
clear status while an honest client is served and the server's memory stays flat.
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

from lightning import InMemoryLightningStore, LightningStoreClient, LightningStoreServer
from lightning.testing.cuts import work_through_cuts
from lightning.testing.hostile import attack
from lightning.testing.kills import server_process, stream_through_kills

MOST_GROWTH_BYTES = 64 * 1024 * 1024
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
    cuts = rollouts = seed = 0
    wrong: list[str] = []
    while time.monotonic() - began < seconds:
        seed += 1
        store = InMemoryLightningStore()
        server = LightningStoreServer(store, port=0)
        await server.start()
        endured = await work_through_cuts(store, server.port, seed=seed, calls=200, cuts=20)
        await server.close()
        cuts, rollouts, wrong = cuts + endured.cuts, rollouts + endured.rollouts, wrong + endured.wrong
    print(
        f"cuts: {cuts}, {rollouts} rollouts with 6 spans each, {len(wrong)} wrong ({seconds:.0f} s)",
        *wrong,
        sep="\n  ",
        flush=True,
    )
    return not wrong


async def prove_hostile(requests: int) -> bool:
    began = time.monotonic()
    statuses: Counter[str] = Counter()
    unclear: list[str] = []
    served, slowest, seed, memory = 0, 0.0, 0, []
    async with server_process("memory") as server:
        client = LightningStoreClient(server.address)
        await client.wait_until_ready(60)
        await client.close()
        while statuses.total() < requests:
            attacked = await attack(server.address, requests=min(REQUESTS_PER_ROUND, requests), seed=seed)
            seed += 1
            statuses += attacked.statuses
            unclear += attacked.unclear
            served += attacked.served
            slowest = max(slowest, attacked.slowest_seconds)
            memory.append(psutil.Process(server.pid).memory_info().rss)
    growth = memory[-1] - memory[0]
    print(
        f"hostile: {statuses.total()} requests, {dict(statuses.most_common())}, {len(unclear)} unclear; beside them "
        f"{served} honest rollouts, the slowest in {slowest:.2f} s; the server's memory {memory[0] / 1e6:.0f} to "
        f"{memory[-1] / 1e6:.0f} MB ({time.monotonic() - began:.0f} s)",
        *sorted(set(unclear)),
        sep="\n  ",
        flush=True,
    )
    return not unclear and growth < MOST_GROWTH_BYTES


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["kills", "cuts", "hostile"], help="one part (default: all)")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0, help="of work over cut connections")
    parser.add_argument("--requests", type=int, default=20_000)
    arguments = parser.parse_args()
    parts = {
        "kills": lambda: prove_kills(arguments.kills),
        "cuts": lambda: prove_cuts(arguments.seconds),
        "hostile": lambda: prove_hostile(arguments.requests),
    }
    sound = [await prove() for name, prove in parts.items() if arguments.only in (None, name)]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
