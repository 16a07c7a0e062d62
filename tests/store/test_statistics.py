"""What our own backends always tell, where the contract leaves it open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning import LightningStore
from lightning.store import InMemoryLightningStore, SQLiteLightningStore
from lightning.testing import FakeClock
from lightning.types import RolloutConfig

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "make", [InMemoryLightningStore, lambda clock: SQLiteLightningStore(Path("s.db"), clock=clock)]
)
async def test_the_figures_that_are_optional_are_there(
    make: Callable[..., LightningStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clock = FakeClock()
    store = make(clock=clock)
    await store.start_rollout(1, config=RolloutConfig(timeout_seconds=10))
    await store.enqueue_rollout(2)
    clock.advance(11)
    statistics = await store.statistics()
    assert statistics["attempts_by_status"] == {"timeout": 1}
    assert statistics["expired_attempts"] == {"timeout": 1}
    assert statistics["oldest_queued_age"] == 11.0
    await store.close()
