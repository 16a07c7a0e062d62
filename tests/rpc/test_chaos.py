"""A connection that is cut again and again under load: everything happens, once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.testing import make_span
from lightning.testing.proxy import TcpProxy

pytestmark = pytest.mark.anyio

CLIENTS = 4
CALLS = 60
CUTS = 5
PATIENT: dict[str, Any] = {"retry_delays": (0.001,) * 200, "health_retry_delays": (0.01,)}


@asynccontextmanager
async def cut_at_random(proxy: TcpProxy, seed: int) -> AsyncIterator[Callable[[], int]]:
    """Cut all connections several times a second, sometimes after losing answers; yields how often it was done."""
    chance = random.Random(seed)
    cuts = 0

    async def cut() -> None:
        nonlocal cuts
        while True:
            await asyncio.sleep(chance.uniform(0.02, 0.2))
            proxy.swallows_answers = chance.random() < 0.5
            await asyncio.sleep(chance.uniform(0, 0.03))
            proxy.cut()
            proxy.swallows_answers = False
            cuts += 1

    task = asyncio.ensure_future(cut())
    try:
        yield lambda: cuts
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        proxy.swallows_answers = False


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_enqueue_every_claim_and_every_span_once(seed: int, serve: Any, connect: Any) -> None:
    server: LightningStoreServer = await serve(InMemoryLightningStore())
    proxy = TcpProxy(server.port)
    address = await proxy.start()
    clients = [connect(address, **PATIENT) for _ in range(CLIENTS)]

    async def enqueue(client: LightningStoreClient, number: int, cuts: Callable[[], int]) -> list[str]:
        made: list[str] = []
        while len(made) < CALLS or cuts() < CUTS:
            made.append((await client.enqueue_rollout([number, len(made)])).rollout_id)
        return made

    async def work(client: LightningStoreClient, number: int) -> list[str]:
        done = []
        while claimed := await client.claim_rollouts(limit=3, worker_id=f"w-{number}", timeout=0.01):
            for rollout in claimed:
                await client.add_many_spans([make_span(rollout, name=f"s{index}") for index in range(3)])
                await client.deliver_spans([make_span(rollout, name=f"s{index}") for index in range(3, 6)])
                await client.update_attempt(rollout.rollout_id, "latest", status="succeeded")
                done.append(rollout.rollout_id)
        return done

    async with cut_at_random(proxy, seed) as cuts:
        made = await asyncio.gather(*[enqueue(client, number, cuts) for number, client in enumerate(clients)])
        done = await asyncio.gather(*[work(client, number) for number, client in enumerate(clients)])
    expected = sorted(rollout_id for ids in made for rollout_id in ids)
    assert len(expected) >= CLIENTS * CALLS
    assert sorted(rollout.rollout_id for rollout in await server.query_rollouts()) == expected
    assert sorted(rollout_id for ids in done for rollout_id in ids) == expected
    for rollout_id in expected:
        assert [attempt.status for attempt in await server.query_attempts(rollout_id)] == ["succeeded"]
        spans = await server.query_spans(rollout_id)
        expected_spans = [(f"s{index}", index + 1) for index in range(6)]
        assert [(span.name, span.sequence_id) for span in spans] == expected_spans
    await proxy.close()
