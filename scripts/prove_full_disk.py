#!/usr/bin/env python3
"""Lets the disk of a store server become full again and again while clients work on it, and counts.

    .venv/bin/python scripts/prove_full_disk.py        as root, for it mounts a small disk in memory

While there is no room every write must be refused as RESOURCE_EXHAUSTED, reads must go on, and health must say that the
server does not serve; as soon as there is room again everything must go on. In the end everything that was acknowledged
must be there, and nothing else. Exits with 1 if any of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightning import LightningStoreClient, SQLiteLightningStore
from lightning.store.persistence.abc import BackendFullError

DISK_BYTES = 192_000_000
ROOM_BYTES = 24_000_000
"""How much of it is given to the store each time: more than its log, which it works into the file first."""
CLIENTS = 8
DEADLINE_SECONDS = 60.0


@contextmanager
def small_disk() -> Iterator[Path]:
    """A disk in memory."""
    with tempfile.TemporaryDirectory(prefix="prove-full-disk-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


async def work(client: LightningStoreClient, told: list[str]) -> None:
    """Enqueue until even small rollouts are refused for want of room."""
    size_bytes = 50_000
    while size_bytes:
        try:
            told.append((await client.enqueue_rollout("x" * size_bytes)).rollout_id)
        except BackendFullError:
            size_bytes //= 2


async def until_health(address: str, status: int) -> None:
    """Return when the server says so."""
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE_SECONDS
        )
        async for answer in watch:
            if answer.status == status:
                return


async def fill_up(address: str, ballast: Path, rounds: int) -> list[str]:
    """Returns what was acknowledged."""
    client = LightningStoreClient(address)
    told: list[str] = []
    for number in range(rounds):
        await asyncio.gather(*(work(client, told) for _ in range(CLIENTS)))
        await until_health(address, health_pb2.HealthCheckResponse.NOT_SERVING)
        total = (await client.query_rollouts(limit=1)).total
        assert total == len(told), f"{total} to be read, {len(told)} acknowledged"
        print(f"full for the {number + 1}. time, {len(told)} rollouts acknowledged", flush=True)
        if number + 1 < rounds:
            os.truncate(ballast, DISK_BYTES - (number + 2) * ROOM_BYTES)
            await until_health(address, health_pb2.HealthCheckResponse.SERVING)
    await client.close()
    return told


async def stored(path: Path) -> list[str]:
    """What is in the file."""
    store = SQLiteLightningStore(path)
    found = [rollout.rollout_id for rollout in await store.query_rollouts()]
    await store.close()
    return found


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with small_disk() as disk:
        path, ballast = disk / "store.db", disk / "ballast"
        ballast.write_bytes(bytes(DISK_BYTES - ROOM_BYTES))
        command = [sys.executable, "-um", "lightning", "store", "--port", "0", "--backend", f"sqlite:{path}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        found = re.search(r" at (\S+), Ctrl-C", server.stdout.readline())
        assert found is not None
        try:
            told = asyncio.run(fill_up(found.group(1), ballast, rounds))
        finally:
            server.kill()  # as it is, on a full disk
            server.communicate()
        ballast.unlink()
        there = asyncio.run(stored(path))
        connection = sqlite3.connect(path)
        (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
        connection.close()
    lost, more = len(set(told) - set(there)), len(set(there) - set(told))
    print(f"{len(told)} acknowledged; {lost} lost, {more} stored although refused; integrity check: {sound}")
    return 0 if not lost and not more and len(there) == len(told) and sound == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
