"""Clients whose connections are cut again and again, often after the answer was lost, and in disorder while they last:
what is sent is delayed, arrives twice, or after what was sent later.

`scripts/prove_network.py` does it at length, a test shortly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.rpc import LightningStoreClient
from lightning.store.contract import LightningStore
from lightning.testing.proxy import Disorder, TcpProxy
from lightning.testing.records import make_span

_PATIENT: dict[str, Any] = {"retry_delays": (0.001,) * 200, "health_retry_delays": (0.01,)}
_DISORDER = Disorder(delay_seconds=0.003, hold_seconds=0.03, duplicates=0.3, stragglers=0.5)
_NAMES = [f"s{index}" for index in range(6)]


@dataclass
class Endured:
    """What was done over connections that were cut, and what was wrong with it."""

    cuts: int = 0
    duplicated: int = 0
    """Connections whose requests reached the server twice."""
    straggled: int = 0
    """Pieces of data that reached the server after their connection had been cut, and the client had made another."""
    rollouts: int = 0
    events: int = 0
    """What watchers of these rollouts were told."""
    wrong: list[str] = field(default_factory=list)
    """What did not happen exactly once."""


async def work_through_cuts(store: LightningStore, port: int, *, seed: int, calls: int, cuts: int) -> Endured:
    """Enqueue rollouts by four clients, have them claimed and finished, and look at what became of them.

    Args:
        store: What is served.
        port: Where.
        seed: Of when connections are cut.
        calls: How many rollouts each client enqueues, at least.
        cuts: How often the connections are to be cut meanwhile, at least.
    """
    proxy = TcpProxy(port, replace(_DISORDER, seed=seed))
    clients = [LightningStoreClient(address, **_PATIENT) for address in [await proxy.start()] * 4]
    endured = Endured()
    try:
        async with _cut_at_random(proxy, seed, endured):
            made = await asyncio.gather(
                *[
                    _enqueue(client, number, lambda done: done >= calls and endured.cuts >= cuts)
                    for number, client in enumerate(clients)
                ]
            )
            watches = [
                asyncio.ensure_future(_watch(client, ids, endured))
                for client, ids in zip(clients, made, strict=True)
            ]
            done = await asyncio.gather(*[_work(client, f"w-{n}") for n, client in enumerate(clients)])
            await asyncio.gather(*watches)
        endured.duplicated, endured.straggled = proxy.duplicated, proxy.straggled
        expected = sorted(rollout_id for ids in made for rollout_id in ids)
        endured.rollouts = len(expected)
        await _compare(store, expected, sorted(rollout_id for ids in done for rollout_id in ids), endured)
    finally:
        for client in clients:
            await client.close()
        await proxy.close()
    return endured


async def _enqueue(client: LightningStoreClient, number: int, enough: Callable[[int], bool]) -> list[str]:
    made: list[str] = []
    while not enough(len(made)):
        made.append((await client.enqueue_rollout([number, len(made)])).rollout_id)
    return made


async def _watch(client: LightningStoreClient, rollout_ids: list[str], endured: Endured) -> None:
    """Follow these to their end, which must be told, and nothing twice."""
    told: dict[str, list[int]] = {rollout_id: [] for rollout_id in rollout_ids}
    last: dict[str, str] = {}
    async for event in client.watch_rollouts(rollout_ids=rollout_ids):
        told[event.rollout.rollout_id].append(event.revision)
        last[event.rollout.rollout_id] = event.rollout.status
        endured.events += 1
    if last != dict.fromkeys(rollout_ids, "succeeded"):
        endured.wrong.append(f"a watch of {len(rollout_ids)} rollouts ended with {last}")
    endured.wrong += [
        f"{rollout_id}: a watcher was told of the revisions {revisions}"
        for rollout_id, revisions in told.items()
        if revisions != sorted(set(revisions))
    ]


async def _work(client: LightningStoreClient, worker_id: str) -> list[str]:
    done = []
    while claimed := await client.claim_rollouts(limit=3, worker_id=worker_id, timeout=0.01):
        for rollout in claimed:
            await client.add_many_spans([make_span(rollout, name=name) for name in _NAMES[:3]])
            await client.deliver_spans([make_span(rollout, name=name) for name in _NAMES[3:]])
            await client.update_attempt(rollout.rollout_id, "latest", status="succeeded")
            done.append(rollout.rollout_id)
    return done


async def _compare(store: LightningStore, made: list[str], done: list[str], endured: Endured) -> None:
    found = sorted(rollout.rollout_id for rollout in await store.query_rollouts())
    if found != made:
        endured.wrong.append(f"{len(made)} rollouts were enqueued, {len(found)} are there")
    if done != made:
        endured.wrong.append(f"{len(made)} rollouts were enqueued, {len(done)} were done")
    for rollout_id in made:
        attempts = [attempt.status for attempt in await store.query_attempts(rollout_id)]
        spans = [(span.name, span.sequence_id) for span in await store.query_spans(rollout_id)]
        if attempts != ["succeeded"] or spans != [(name, n) for n, name in enumerate(_NAMES, start=1)]:
            endured.wrong.append(f"{rollout_id}: attempts {attempts}, spans {spans}")


@asynccontextmanager
async def _cut_at_random(proxy: TcpProxy, seed: int, endured: Endured) -> AsyncIterator[None]:
    """Cut all connections several times a second, sometimes after losing answers."""
    chance = random.Random(seed)

    async def cut() -> None:
        while True:
            await asyncio.sleep(chance.uniform(0.05, 0.4))
            proxy.swallows_answers = chance.random() < 0.5
            await asyncio.sleep(chance.uniform(0, 0.03))
            proxy.cut()
            proxy.swallows_answers = False
            endured.cuts += 1

    task = asyncio.ensure_future(cut())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        proxy.swallows_answers = False
