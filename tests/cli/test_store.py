"""`lightning store` on a real process: what it says, and how it ends."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning.rpc import LightningStoreClient, StoreUnavailableError
from lightning.types import Rollout

DEADLINE_SECONDS = 40
Process = subprocess.Popen[str]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Process]:
    """A server at a free port, on SQLite, that tells who calls."""
    words = ["store", "--port", "0", "--backend", "sqlite:store.db", "--access-log", "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-um", "lightning", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def endpoint_of(process: Process) -> str:
    assert process.stdout is not None
    found = re.search(r" at (\S+), Ctrl-C ends it", process.stdout.readline())
    assert found is not None
    return found.group(1)


@pytest.mark.anyio
async def test_sigterm_drains(store: Process) -> None:
    client = LightningStoreClient(await asyncio.to_thread(endpoint_of, store), retry_delays=())
    rollout: Rollout = await client.enqueue_rollout("task")
    waiting = [
        asyncio.ensure_future(client.claim_rollouts(worker_id="w-2", timeout=DEADLINE_SECONDS)),
        asyncio.ensure_future(
            client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=DEADLINE_SECONDS)
        ),
    ]
    (claimed,) = await waiting[0]
    waiting[0] = asyncio.ensure_future(client.claim_rollouts(worker_id="w-2", timeout=DEADLINE_SECONDS))
    await client.update_worker("w-2")  # by then they wait
    store.send_signal(signal.SIGTERM)
    for call in waiting:  # what waits returns at once, and is told why it cannot wait on
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(call, DEADLINE_SECONDS)
    await client.close()
    assert await asyncio.to_thread(store.wait, DEADLINE_SECONDS) == 0
    assert store.stdout is not None
    assert store.stderr is not None
    output, log = store.stdout.read(), store.stderr.read()
    assert re.search(r"metrics: +http://127\.0\.0\.1:\d+/metrics", output)
    assert "ending: new calls are refused, those under way are finished" in output
    lines = log.splitlines()
    assert all(
        re.search(r" /[\w.]+/\w+ peer=\S+ token=- certificate=- code=[A-Z_]+ seconds=", line)
        for line in lines
    )
    assert any("/EnqueueRollouts " in line and " code=OK " in line for line in lines)
    assert claimed.input == "task"
