"""Heartbeats: that they come, with what, and what they bring back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lightning.runner import AgentRunner, heartbeat, snapshot, system_snapshot
from lightning.runner.heartbeat import Heartbeat
from lightning.store.backends import InMemoryLightningStore
from lightning.testing.unreliable import UnreliableStore
from lightning.types import HeartbeatReply, RolloutConfig, WorkerHeartbeat

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0
MODES = pytest.mark.parametrize("mode", ["thread", "asyncio"])


class Recorder(UnreliableStore):
    """Notes the heartbeats that reach it, and on which thread."""

    def __init__(self) -> None:
        super().__init__(InMemoryLightningStore())
        self.heartbeats: list[WorkerHeartbeat] = []
        self.threads: set[str] = set()
        self.came = threading.Condition()

    async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
        reply: HeartbeatReply = await self._forward("send_heartbeat", heartbeat)
        with self.came:
            self.heartbeats.append(heartbeat)
            self.threads.add(threading.current_thread().name)
            self.came.notify_all()
        return reply

    async def wait_for(self, count: int) -> None:
        def wait() -> bool:
            with self.came:
                return self.came.wait_for(lambda: len(self.heartbeats) >= count, DEADLINE_SECONDS)

        assert await asyncio.to_thread(wait)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@MODES
async def test_starting_announces_the_worker_and_stopping_sends_the_last_heartbeat(
    recorder: Recorder, mode: Any
) -> None:
    runner = AgentRunner(
        store=recorder,
        worker_id="worker-1",
        heartbeat_interval=7,
        interval_jitter=0.25,
        heartbeat_launch_mode=mode,
    )
    await runner.start()
    assert len(recorder.heartbeats) == 1
    worker = await recorder.get_worker_by_id("worker-1")
    assert worker is not None
    assert worker.status == "unknown"
    assert worker.heartbeat_stats is not None
    assert worker.heartbeat_stats["cpu"]["threads"] >= 1
    await runner.stop()
    assert len(recorder.heartbeats) == 2
    for beat in recorder.heartbeats:
        assert (beat.worker_id, beat.instance_id, beat.attempts) == ("worker-1", runner.instance_id, [])
        assert beat.silent_after_seconds == 8.25
    assert (threading.current_thread().name in recorder.threads) is (mode == "asyncio")
    await recorder.close()


@MODES
async def test_heartbeats_come_regularly_and_name_the_attempts_in_hand(recorder: Recorder, mode: Any) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def agent(task: Any) -> None:
        begun.set()
        await go_on.wait()

    enqueued = await recorder.enqueue_rollout("x")
    runner = AgentRunner(
        store=recorder,
        agent=agent,
        max_rollouts=1,
        heartbeat_interval=0.02,
        interval_jitter=0.01,
        heartbeat_launch_mode=mode,
    )
    work = asyncio.create_task(runner.run())
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    await recorder.wait_for(len(recorder.heartbeats) + 3)
    named = {ref.rollout_id for ref in recorder.heartbeats[-1].attempts}
    go_on.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert named == {enqueued.rollout_id}
    assert recorder.heartbeats[-1].attempts == []
    await recorder.close()


async def test_a_blocked_event_loop_keeps_its_lease_in_thread_mode(recorder: Recorder) -> None:
    async def agent(task: Any) -> float:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            time.sleep(0.01)  # noqa: ASYNC251  # the fault that is to be survived
        return 1.0

    config = RolloutConfig(unresponsive_seconds=0.4)
    enqueued = await recorder.enqueue_rollout("x", config=config)
    runner = AgentRunner(
        store=recorder,
        agent=agent,
        max_rollouts=1,
        heartbeat_interval=0.05,
        interval_jitter=0,
        heartbeat_launch_mode="thread",
    )
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    (ended,) = await recorder.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=1)
    assert ended.status == "succeeded"
    await recorder.close()


@MODES
async def test_an_attempt_with_a_short_lease_is_kept_alive_by_heartbeats_as_frequent_as_it_takes(
    recorder: Recorder, mode: Any
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def agent(task: Any) -> None:
        begun.set()
        await go_on.wait()

    runner = AgentRunner(
        store=recorder, agent=agent, max_rollouts=1, heartbeat_interval=3600, heartbeat_launch_mode=mode
    )
    await runner.start()
    config = RolloutConfig(unresponsive_seconds=0.3)
    enqueued = await recorder.enqueue_rollout("x", config=config)
    work = asyncio.create_task(runner.run())
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    await recorder.wait_for(6)  # one at the start, then one every 0.1 s
    go_on.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    (ended,) = await recorder.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=1)
    assert ended.status == "succeeded"
    assert [beat.heartbeat_stats is None for beat in recorder.heartbeats[:6]] == [False] + [True] * 5
    await runner.stop()
    await recorder.close()


async def test_a_store_out_of_reach_delays_neither_start_nor_stop_for_long(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning.runner.agent._START_WAIT_SECONDS", 0.05)
    recorder.away = True
    runner = AgentRunner(store=recorder, heartbeat_interval=0.02, interval_jitter=0)
    await asyncio.wait_for(runner.start(), DEADLINE_SECONDS)
    with pytest.raises(ConnectionError):
        await runner.heartbeat()
    recorder.away = False
    await recorder.wait_for(2)
    recorder.away = True
    await asyncio.wait_for(runner.stop(), DEADLINE_SECONDS)
    warnings = [record.message for record in caplog.records if "no heartbeat" in record.message]
    assert 1 <= len(warnings) <= 2
    recorder.away = False
    await recorder.close()


def make_heartbeat(store: Recorder, **settings: Any) -> Heartbeat:
    defaults: dict[str, Any] = {"interval": 10.0, "jitter": 0.5}
    return Heartbeat(
        store,
        worker_id="w",
        instance_id="i",
        attempts=list,
        shortest_lease=lambda: None,
        obey=print,
        **{**defaults, **settings},
    )


async def test_a_stale_snapshot_is_not_sent_but_the_sign_of_life_is(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    took = [11.5]

    def slow(include_gpu: bool) -> dict[str, Any]:
        now[0] += took[0]
        return {"took": took[0]}

    monkeypatch.setattr(heartbeat, "system_snapshot", slow)
    beats = make_heartbeat(recorder)
    await beats.beat()
    took[0] = 11.6
    await beats.beat()
    beats.close()
    assert [beat.heartbeat_stats for beat in recorder.heartbeats] == [{"took": 11.5}, None]
    worker = await recorder.get_worker_by_id("w")
    assert worker is not None
    assert worker.heartbeat_stats == {"took": 11.5}
    await recorder.close()


async def test_a_snapshot_that_hangs_does_not_keep_the_heartbeat(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(heartbeat, "_SNAPSHOT_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "system_snapshot", lambda include_gpu: {"released": release.wait()})
    beats = make_heartbeat(recorder)
    await beats.beat()
    await beats.beat()
    assert [beat.heartbeat_stats for beat in recorder.heartbeats] == [None, None]
    release.set()
    monkeypatch.setattr(heartbeat, "_SNAPSHOT_WAIT_SECONDS", DEADLINE_SECONDS)
    await beats.beat()
    assert recorder.heartbeats[-1].heartbeat_stats == {"released": True}
    beats.close()
    await recorder.close()


async def test_measurements_that_fail_are_logged_and_left_out(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(include_gpu: bool) -> dict[str, Any]:
        raise OSError("no such disk")

    monkeypatch.setattr(heartbeat, "system_snapshot", fail)
    beats = make_heartbeat(recorder)
    await beats.beat()
    beats.close()
    assert recorder.heartbeats[0].heartbeat_stats is None
    assert any("no such disk" in (record.exc_text or "") for record in caplog.records)
    await recorder.close()


async def test_a_store_that_does_not_answer_counts_as_out_of_reach(recorder: Recorder) -> None:
    class Mute(Recorder):
        async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
            await asyncio.sleep(3600)
            raise AssertionError

    beats = make_heartbeat(Mute(), interval=0.01, jitter=0)
    beats._silent_after = 0.02
    with pytest.raises(ConnectionError, match=r"did not answer within 0\.02 s"):
        await beats.beat()
    beats.close()
    await recorder.close()


async def test_an_error_of_the_store_does_not_end_the_heartbeats(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [ValueError("not now"), RuntimeError("nor now")]

    class Moody(Recorder):
        async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
            if failures:
                raise failures.pop()
            return await super().send_heartbeat(heartbeat)

    moody = Moody()
    beats = make_heartbeat(moody, interval=0.005, jitter=0)
    running = asyncio.create_task(beats.run())
    await moody.wait_for(1)
    running.cancel()
    await asyncio.wait({running})
    beats.close()
    assert sum("a heartbeat failed" in record.message for record in caplog.records) == 2
    await moody.close()
    await recorder.close()


# --- What is measured ------------------------------------------------------------------------------------------


def test_a_snapshot_is_json_and_says_what_the_machine_is() -> None:
    taken = system_snapshot()
    assert json.loads(json.dumps(taken)) == taken
    assert set(taken) == {"host", "cpu", "memory", "disk", "network"}
    assert taken["host"]["name"]
    assert taken["host"]["os"]
    assert taken["cpu"]["name"]
    assert taken["cpu"]["threads"] >= 1
    assert 0 <= taken["cpu"]["usage_percent"] <= 100
    assert taken["memory"]["total_bytes"] > taken["memory"]["available_bytes"] > 0
    assert taken["disk"]["total_bytes"] >= taken["disk"]["free_bytes"]


def test_without_nvml_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(snapshot.importlib, "import_module", missing)
    assert system_snapshot(include_gpu=True)["gpus"] == []


class FakeNvml:
    """As much of `pynvml` as is used."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """What it raises."""

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at = fail_at
        self.open = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": b"Big GPU",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, used=40),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=7),
            "nvmlDeviceGetTemperature": 55,
            "nvmlInit": None,
            "nvmlShutdown": None,
        }

        def call(*args: Any) -> Any:
            if name == self.fail_at:
                raise self.NVMLError("no driver")
            self.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return answers[name]

        return call


def test_gpus_are_measured_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(snapshot.importlib, "import_module", lambda name: nvml)
    gpus = system_snapshot(include_gpu=True)["gpus"]
    assert [gpu["index"] for gpu in gpus] == [0, 1]
    assert gpus[0] == {
        "index": 0,
        "name": "Big GPU",
        "memory_total_bytes": 100,
        "memory_used_bytes": 40,
        "usage_percent": 7,
        "temperature_celsius": 55,
    }
    assert nvml.open == 0


@pytest.mark.parametrize("fail_at", ["nvmlInit", "nvmlDeviceGetCount"])
def test_nvml_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch, fail_at: str) -> None:
    nvml = FakeNvml(fail_at)
    monkeypatch.setattr(snapshot.importlib, "import_module", lambda name: nvml)
    assert system_snapshot(include_gpu=True)["gpus"] == []
    assert nvml.open == 0
