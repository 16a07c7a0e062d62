"""`kill -9` in the middle of many writes: the file opens as it is, and all that was acknowledged is in it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lightning.store import SQLiteLightningStore

pytestmark = pytest.mark.anyio

LOAD = Path(__file__).with_name("sqlite_crash_load.py")
KILLS = 3
CALLS_BEFORE_KILL = 400

Acknowledged = dict[str, list[list[Any]]]


def work_until_killed(path: Path, durability: str, seed: int) -> Acknowledged:
    """What was acknowledged to 8 clients of a store until it was killed."""
    command = [sys.executable, str(LOAD), str(path), durability, str(seed)]
    acknowledged: Acknowledged = defaultdict(list)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for number, line in enumerate(child.stdout):
            if number == CALLS_BEFORE_KILL:
                child.kill()  # and read on: what it said before counts
            if line.endswith("\n"):
                kind, *what = json.loads(line)
                acknowledged[kind].append(what)
    assert child.returncode == -9, "it ended by itself"
    return acknowledged


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "store.db"
    acknowledged: Acknowledged = defaultdict(list)
    for seed in range(KILLS):
        for kind, calls in work_until_killed(path, durability, seed).items():
            acknowledged[kind].extend(calls)
        store = SQLiteLightningStore(path)
        await check_rollouts(store, acknowledged)
        await check_spans(store, acknowledged)
        for resources_id, length in acknowledged["published"]:
            update = await store.get_resources_by_id(resources_id)
            assert update is not None
            assert len(update.resources["prompt"].template) == length
        await store.close()
        check_file(path)
    for kind in ("enqueued", "claimed", "spans", "numbered", "updated", "published", "finished"):
        assert acknowledged[kind], f"no call was acknowledged as {kind}: the load is not what it should be"


async def check_rollouts(store: SQLiteLightningStore, acknowledged: Acknowledged) -> None:
    stored = {rollout.rollout_id: rollout for rollout in await store.query_rollouts()}
    for rollout_id, task in acknowledged["enqueued"]:
        assert stored[rollout_id].input == task
    claims = [rollout_id for rollout_id, _ in acknowledged["claimed"]]
    assert len(claims) == len(set(claims)), "a rollout was claimed twice"
    for rollout_id, attempt_id in acknowledged["claimed"]:
        assert [attempt.attempt_id for attempt in await store.query_attempts(rollout_id)] == [attempt_id]
        assert stored[rollout_id].status != "queuing"
    for rollout_id, step in acknowledged["updated"]:
        assert stored[rollout_id].metadata == {"step": step}
    for (rollout_id,) in acknowledged["finished"]:
        assert stored[rollout_id].status == "succeeded"


async def check_spans(store: SQLiteLightningStore, acknowledged: Acknowledged) -> None:
    found: dict[str, dict[str, int]] = {}
    for rollout_id, _, spans in acknowledged["spans"]:
        if rollout_id not in found:
            found[rollout_id] = {
                span.span_id: span.sequence_id for span in await store.query_spans(rollout_id)
            }
        assert dict(spans).items() <= found[rollout_id].items()
    for rollout_id, attempt_id, number in acknowledged["numbered"]:
        assert await store.get_next_span_sequence_id(rollout_id, attempt_id) > number


def check_file(path: Path) -> None:
    """SQLite finds the file sound, and the store's own bookkeeping fits what is there."""
    connection = sqlite3.connect(path)
    one = lambda sql: connection.execute(sql).fetchone()[0]  # noqa: E731
    assert one("PRAGMA integrity_check") == "ok"
    counters = dict(connection.execute("SELECT name, value FROM counter"))
    statuses = connection.execute(
        "SELECT 'rollouts.' || status, count(*) FROM rollout GROUP BY status"
    ).fetchall()
    assert {
        name: count for name, count in counters.items() if name.startswith("rollouts.") and count
    } == dict(statuses)
    for name, table in (("attempts", "attempt"), ("spans", "span"), ("workers", "worker")):
        assert counters.get(name, 0) == one(f"SELECT count(*) FROM {table}")
    assert counters["span_bytes"] == one("SELECT sum(length(payload)) FROM span")
    assert counters["revision"] == one("SELECT max(revision) FROM rollout")
    assert counters["ordinal"] == one("SELECT max(ordinal) FROM rollout")
    assert counters["queue_position"] >= (one("SELECT max(queue_position) FROM rollout") or 0)
    # no rollout is stuck: it waits in the queue, or somebody executes it, or it is at an end
    assert one("SELECT count(*) FROM rollout WHERE (status = 'queuing') != (queue_position IS NOT NULL)") == 0
    assert one("SELECT count(*) FROM rollout WHERE attempts = 0 AND status != 'queuing'") == 0
    orphans = "SELECT count(*) FROM span LEFT JOIN attempt USING (rollout) WHERE attempt.attempt_id IS NULL"
    assert one(orphans) == 0
    connection.close()
