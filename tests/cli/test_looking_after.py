"""`lightning status`, `cancel`, `drain`, `requeue`: what they say about a store, and what they do to it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning.cli import app
from lightning.cli.errors import run_reporting
from lightning.rpc import LightningStoreServer
from lightning.rpc.tokens import add_token
from lightning.store import InMemoryLightningStore
from lightning.types import AttemptedRollout, Drain, RolloutConfig

DEADLINE_SECONDS = 40.0
FINISHED = ("succeeded", "failed", "cancelled")

pytestmark = pytest.mark.anyio


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Desk:
    """A store that is served, and somebody who types commands at it."""

    def __init__(self, server: LightningStoreServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self._capsys = capsys

    async def type(self, words: str, *more: str) -> Said:
        arguments = [*words.split(), *more, "--connect", self.server.endpoint]
        code = await asyncio.to_thread(
            run_reporting, lambda: app(arguments, prog_name="lightning", standalone_mode=False)
        )
        captured = self._capsys.readouterr()
        return Said(code, captured.out, captured.err)

    async def work(self, *, worker_id: str = "w-1", **config: Any) -> AttemptedRollout:
        """A rollout under way."""
        await self.server.enqueue_rollout("task", config=RolloutConfig(**config))
        claimed = await self.server.dequeue_rollout(worker_id)
        assert claimed is not None
        return claimed

    async def status_of(self, rollout_id: str) -> str:
        rollout = await self.server.get_rollout_by_id(rollout_id)
        assert rollout is not None
        return rollout.status


@pytest.fixture
async def desk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setenv("COLUMNS", "140")
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    yield Desk(server, capsys)
    await server.close()


# --- status --------------------------------------------------------------------------------------------------------


async def test_status_of_an_empty_store(desk: Desk) -> None:
    said = await desk.type("status --interval 0")
    assert (said.code, said.err) == (0, "")
    assert f"store     {desk.server.endpoint}, up " in said.out
    assert "queue     0" in [line.rstrip() for line in said.out.splitlines()]
    assert "nothing is stuck" in said.out


async def test_status_shows_queue_workers_and_what_is_stuck(desk: Desk) -> None:
    under_way = await desk.work()
    await desk.server.enqueue_rollout("waits")
    said = await desk.type("status --json --interval 0 --stuck-after 0")
    picture = said.json
    assert (picture["queued"], picture["rollouts"]["preparing"]) == (1, 1)
    assert picture["oldest_queued_seconds"] >= 0
    assert picture["workers"] == {"busy": 1, "idle": 0, "ready": 0, "gone": 0}
    [worker] = picture["worker_list"]
    assert (worker["worker_id"], worker["rollout_id"]) == ("w-1", under_way.rollout_id)
    [stuck] = picture["stuck"]
    assert (stuck["attempt_id"], stuck["worker_id"]) == (under_way.attempt.attempt_id, "w-1")
    assert stuck["ends_by_itself"] is False
    assert picture["nobody_claims"] is False
    assert picture["rates"] == {}

    table = (await desk.type("status --interval 0 --stuck-after 0")).out
    assert f"{under_way.rollout_id} at w-1: nothing heard for" in table
    assert "has no limit: lightning requeue" in table
    calm = (await desk.type("status --json --interval 0")).json
    assert calm["stuck"] == []


async def test_status_says_when_a_limit_will_end_what_is_stuck(desk: Desk) -> None:
    await desk.work(timeout_seconds=3600)
    [stuck] = (await desk.type("status --json --interval 0 --stuck-after 0")).json["stuck"]
    assert stuck["ends_by_itself"] is True


async def test_status_says_when_nobody_claims(desk: Desk) -> None:
    await desk.server.enqueue_rollout("waits")
    said = await desk.type("status --interval 0 --stuck-after 0")
    assert "no worker is there; start some with: lightning runner" in said.out


async def test_status_shows_what_workers_measure(desk: Desk) -> None:
    await desk.server.update_worker("w-1", {"cpu": {"usage_percent": 12.4}, "memory": "much"})
    [worker] = (await desk.type("status --json --interval 0")).json["worker_list"]
    assert (worker["status"], worker["cpu_percent"], worker["memory_percent"]) == ("ready", 12.4, None)


async def test_status_measures_rates_between_two_looks(desk: Desk) -> None:
    rates = (await desk.type("status --json --interval 0.05")).json["rates"]
    assert rates == {"rollouts_per_second": 0.0, "spans_per_second": 0.0}


async def test_watching_goes_on_until_ctrl_c(desk: Desk) -> None:
    words = ["status", "--watch", "--json", "--interval", "0.05", "--connect", desk.server.endpoint]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-um", "lightning", *words, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    try:
        first = json.loads(await process.stdout.readline())
        await desk.server.enqueue_rollout("a task")
        while (look := json.loads(await process.stdout.readline()))["queued"] == 0:
            pass
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), DEADLINE_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert (first["queued"], first["rates"]) == (0, {})
    assert (look["queued"], look["rates"]["rollouts_per_second"]) == (1, 0.0)
    assert (process.returncode, errors) == (130, b"")


# --- cancel --------------------------------------------------------------------------------------------------------


async def test_cancel_takes_rollouts_from_queue_and_worker(desk: Desk) -> None:
    under_way = await desk.work()
    queued = await desk.server.enqueue_rollout("waits")
    said = await desk.type("cancel", under_way.rollout_id, queued.rollout_id)
    assert said.out.splitlines() == [
        f"{under_way.rollout_id}: cancelled (was preparing)",
        f"{queued.rollout_id}: cancelled (was queuing)",
    ]
    assert said.code == 0
    latest = await desk.server.get_latest_attempt(under_way.rollout_id)
    assert latest is not None
    assert latest.status == "cancelled"
    assert await desk.server.dequeue_rollout() is None


async def test_cancel_leaves_what_has_ended(desk: Desk) -> None:
    done = await desk.work()
    await desk.server.update_attempt(done.rollout_id, done.attempt.attempt_id, status="succeeded")
    said = await desk.type("cancel --json", done.rollout_id)
    assert said.code == 0
    [outcome] = said.json
    assert (outcome["done"], outcome["result"]) == (False, "has ended already: succeeded")
    assert await desk.status_of(done.rollout_id) == "succeeded"


async def test_cancel_queued_or_all(desk: Desk) -> None:
    under_way = await desk.work()
    queued = await desk.server.enqueue_rollout("waits")
    assert [each["id"] for each in (await desk.type("cancel --queued --json")).json] == [queued.rollout_id]
    assert await desk.status_of(under_way.rollout_id) == "preparing"
    assert [each["id"] for each in (await desk.type("cancel --all --json")).json] == [under_way.rollout_id]
    assert (await desk.type("cancel --all")).out == "there is nothing to cancel\n"


async def test_cancel_goes_on_after_an_unknown_id(desk: Desk) -> None:
    queued = await desk.server.enqueue_rollout("waits")
    said = await desk.type("cancel ro-absent", queued.rollout_id)
    assert said.code == 1
    assert said.err == "error: unknown rollout 'ro-absent'\n"
    assert await desk.status_of(queued.rollout_id) == "cancelled"


# --- requeue -------------------------------------------------------------------------------------------------------


async def test_requeue_gives_a_failed_rollout_another_attempt(desk: Desk) -> None:
    failed = await desk.work()
    await desk.server.update_attempt(failed.rollout_id, failed.attempt.attempt_id, status="failed")
    said = await desk.type("requeue --failed")
    assert (said.code, said.out) == (0, f"{failed.rollout_id}: requeued (was failed)\n")
    again = await desk.server.dequeue_rollout("w-2")
    assert again is not None
    assert (again.rollout_id, again.attempt.sequence_id) == (failed.rollout_id, 2)


async def test_requeue_takes_stuck_work_from_its_worker_without_ending_the_rollout(desk: Desk) -> None:
    stuck = await desk.work()  # whose config allows one attempt only
    waiting = asyncio.ensure_future(desk.server.wait_for_rollouts(rollout_ids=[stuck.rollout_id]))
    said = await desk.type("requeue --stuck --stuck-after 0 --json")
    [outcome] = said.json
    assert (outcome["done"], outcome["result"]) == (True, "requeued (was preparing at w-1)")
    again = await desk.server.dequeue_rollout("w-2")
    assert again is not None
    assert (again.rollout_id, again.attempt.sequence_id) == (stuck.rollout_id, 2)
    attempts = await desk.server.query_attempts(stuck.rollout_id)
    assert [attempt.status for attempt in attempts] == ["unresponsive", "preparing"]
    assert not waiting.done()
    await desk.server.update_attempt(again.rollout_id, again.attempt.attempt_id, status="succeeded")
    [done] = await asyncio.wait_for(waiting, DEADLINE_SECONDS)
    assert done.status == "succeeded"


async def test_requeue_leaves_the_queue_and_the_cancelled(desk: Desk) -> None:
    queued = await desk.server.enqueue_rollout("waits")
    cancelled = await desk.server.enqueue_rollout("not wanted")
    await desk.server.update_rollout(cancelled.rollout_id, status="cancelled")
    said = await desk.type("requeue", queued.rollout_id, cancelled.rollout_id)
    assert said.out == f"{queued.rollout_id}: is in the queue already\n"
    assert said.code == 1
    [line] = said.err.splitlines()
    assert cancelled.rollout_id in line
    assert await desk.status_of(cancelled.rollout_id) == "cancelled"


# --- drain ---------------------------------------------------------------------------------------------------------


async def listen(desk: Desk, worker_id: str) -> asyncio.Task[Any]:
    """A worker process that is there to be told."""
    await desk.server.update_worker(worker_id)
    listening = asyncio.create_task(
        desk.server.receive_commands(worker_id, instance_id="i", timeout=DEADLINE_SECONDS)
    )
    await asyncio.sleep(0)
    return listening


async def test_drain_tells_those_whom_a_pattern_means(desk: Desk) -> None:
    one, two = await listen(desk, "host-a-0"), await listen(desk, "host-b-0")
    said = await desk.type("drain host-a-* --reason maintenance")
    assert (said.code, said.out) == (0, "host-a-0: drains\n")
    assert list(await one) == [Drain(reason="maintenance")]
    assert not two.done()
    told = (await desk.type("drain --all --json")).json
    assert "host-b-0" in [each["id"] for each in told]
    assert list(await two) == [Drain(reason="by lightning drain")]


async def test_drain_says_who_is_not_there(desk: Desk) -> None:
    await desk.server.update_worker("gone")
    absent = await desk.type("drain gone")
    assert (absent.code, absent.err) == (1, "error: worker 'gone' is not there to be told\n")
    unknown = await desk.type("drain nobody")
    assert (unknown.code, unknown.err) == (1, "error: unknown worker 'nobody'\n")
    assert (await desk.type("drain --all")).out == "no worker is there\n"


# --- what all of them do alike ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("cancel", "say which: give ROLLOUT or --all or --queued"),
        ("cancel --all --queued", "--all and --queued exclude each other"),
        ("requeue ro-1 --failed", "ROLLOUT and --failed exclude each other"),
        ("drain", "say which: give WORKER or --all"),
        ("status --connect nowhere", "'nowhere' is not the address of a store"),
        ("status --interval -1", "Invalid value for '--interval'"),
        ("drain --all --token-file absent", "absent"),
    ],
)
async def test_what_was_not_understood(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_reporting(lambda: app(words.split(), prog_name="lightning", standalone_mode=False))
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert (code, captured.out) == (2, "")


@pytest.mark.parametrize("words", ["status", "drain --all"])
async def test_a_server_that_is_not_there(words: str, desk: Desk) -> None:
    await desk.server.stop()
    said = await desk.type(words)
    [line] = said.err.splitlines()
    assert line.startswith("error: ")
    assert desk.server.endpoint in line
    assert (said.code, said.out) == (1, "")


async def test_a_token_that_may_only_look(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    (tmp_path / "viewer.token").write_text(add_token(tokens, "viewer", None, None)[0])
    server = LightningStoreServer(InMemoryLightningStore(), port=0, tokens=tokens)
    await server.start()
    try:
        desk = Desk(server, capsys)
        rollout = await server.enqueue_rollout("a task")
        shown = ["--token-file", str(tmp_path / "viewer.token")]
        assert (await desk.type("status --json --interval 0", *shown)).json["queued"] == 1
        said = await desk.type("cancel --all", *shown)
        [line] = said.err.splitlines()
        assert said.code == 1
        assert "viewer" in line
        assert await desk.status_of(rollout.rollout_id) == "queuing"
    finally:
        await server.close()
