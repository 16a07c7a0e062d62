"""The live view of a training, drawn on a terminal of a given width."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from lightning.demo.algorithm import TrainingPlan
from lightning.demo.view import TrainingView
from lightning.runner import system_snapshot
from lightning.store import InMemoryLightningStore

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 30


def picture(view: TrainingView, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(view._render())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


async def drawn(store: InMemoryLightningStore, width: int) -> list[str]:
    """The picture as soon as what the store holds is in it."""

    async def watch(view: TrainingView) -> list[str]:
        view.started(store, TrainingPlan())
        while not any("runner-0" in line for line in picture(view, width)):  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
        return picture(view, width)

    with TrainingView(Console(file=io.StringIO()), "a title") as view:
        return await asyncio.wait_for(watch(view), DEADLINE_SECONDS)


async def test_a_worker_is_shown_with_what_its_heartbeats_measure() -> None:
    store = InMemoryLightningStore()
    snapshot = system_snapshot()
    snapshot["cpu"]["usage_percent"] = 12.0
    snapshot["memory"]["usage_percent"] = 34.0
    await store.update_worker("runner-0", snapshot)
    await store.update_worker("runner-1", {"cpu": "another program's", "memory": {}})
    lines = await drawn(store, width=100)
    (measured,) = [line for line in lines if "runner-0" in line]
    assert "12 %" in measured
    assert "34 %" in measured
    (strange,) = [line for line in lines if "runner-1" in line]
    assert "%" not in strange
    await store.close()


async def test_the_rates_stay_on_their_lines_in_a_narrow_terminal() -> None:
    store = InMemoryLightningStore()
    await store.update_worker("runner-0")
    lines = await drawn(store, width=60)
    assert all(len(line) == 60 for line in lines)
    rollouts, spans = [line for line in lines if "/s" in line]
    assert "done" in rollouts
    assert "stored" in spans
    assert rollouts.index("/s") == spans.index("/s")
    await store.close()
