"""Bad networks, killed servers, hostile requests: shortly. `scripts/prove_network.py` goes on for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning.rpc import LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.testing.cuts import work_through_cuts
from lightning.testing.hostile import attack
from lightning.testing.kills import stream_through_kills

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_enqueue_every_claim_and_every_span_once(seed: int, serve: Any) -> None:
    store = InMemoryLightningStore()
    server: LightningStoreServer = await serve(store)
    endured = await work_through_cuts(store, server.port, seed=seed, calls=20, cuts=5)
    assert endured.wrong == []
    assert endured.rollouts >= 4 * 20
    assert endured.events >= 4 * 20
    assert endured.cuts >= 5
    assert endured.duplicated
    assert endured.straggled


async def test_spans_survive_that_the_server_is_killed(tmp_path: Path) -> None:
    streamed = await stream_through_kills(tmp_path / "store.db", kills=2)
    assert streamed.sound, streamed
    assert streamed.kills == 2
    assert streamed.acknowledged >= 1000


async def test_hostile_requests_get_a_clear_status_and_cost_nobody_else(server: LightningStoreServer) -> None:
    attacked = await attack(server.endpoint, requests=400)
    assert attacked.unclear == []
    assert attacked.requests == 400
    assert attacked.served
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= attacked.statuses.keys()
