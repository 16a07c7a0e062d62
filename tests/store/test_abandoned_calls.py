"""A caller that goes away in the middle of a verb: what the verb had begun is finished, and everybody is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lightning.store import SQLiteLightningStore

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0


async def abandoned(call: asyncio.Task[object], turns: int) -> None:
    """Cancel `call` after the event loop has gone round so often."""
    for _ in range(turns):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_a_report_that_was_recorded_wakes_who_waits_for_it(tmp_path: Path, turns: int) -> None:
    store = SQLiteLightningStore(tmp_path / "store.db", durability="normal")
    try:
        started = await store.start_rollout("task", worker_id="w")
        waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        report = asyncio.ensure_future(
            store.update_attempt(started.rollout_id, started.attempt.attempt_id, status="succeeded")
        )
        await abandoned(report, turns)
        # whether it came to be recorded or not: another report of the same changes nothing, and hides nothing
        status = (await store.update_rollout(started.rollout_id)).status
        if status == "succeeded":
            await asyncio.wait_for(waiting, DEADLINE_SECONDS)
            worker = await store.get_worker_by_id("w")
            assert worker is not None
            assert worker.status == "idle"
        else:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    finally:
        await store.close()


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_a_rollout_that_was_enqueued_is_offered_to_who_waits_for_work(
    tmp_path: Path, turns: int
) -> None:
    store = SQLiteLightningStore(tmp_path / "store.db", durability="normal")
    try:
        await store.statistics()
        waiting = asyncio.ensure_future(store.claim_rollouts(timeout=None))
        enqueue = asyncio.ensure_future(store.enqueue_rollout("task"))
        await abandoned(enqueue, turns)
        if (await store.query_rollouts()).total:
            assert len(await asyncio.wait_for(waiting, DEADLINE_SECONDS)) == 1
        else:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    finally:
        await store.close()
