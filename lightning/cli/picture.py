"""What is going on at a store, gathered for people and for programs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.store.contract import LightningStore
    from lightning.types import AttemptedRollout, LightningStoreStatistics, Worker

DEFAULT_STUCK_AFTER_SECONDS = 60.0
_READY_WITHIN_SECONDS = 15.0
"""A worker without any work so far reads `unknown` at the store; one heard of so recently is there, and waits."""
_MOST_LISTED = 1000
"""Of workers, and of rollouts under way: the most that are looked at one by one."""


@dataclass(frozen=True)
class StuckAttempt:
    """An attempt that is open, and nothing is heard of it."""

    rollout_id: str
    attempt_id: str
    worker_id: str | None
    silent_seconds: float
    running_seconds: float
    ends_by_itself: bool
    """Whether a limit of the rollout will close it; otherwise it stays until somebody does something."""


@dataclass(frozen=True)
class WorkerLine:
    """A worker that is there, or holds an attempt."""

    worker_id: str
    status: str
    """`busy`, `idle`, `ready` (there, but had no work yet), or `gone`."""
    rollout_id: str | None
    attempt_id: str | None
    silent_seconds: float | None
    cpu_percent: float | None
    memory_percent: float | None


@dataclass(frozen=True)
class Picture:
    """One look at a store."""

    server: str
    time: float
    uptime_seconds: float | None
    queued: int
    oldest_queued_seconds: float | None
    rollouts: Mapping[str, int]
    attempts: Mapping[str, int]
    expired_attempts: Mapping[str, int]
    spans: int
    workers: Mapping[str, int]
    """How many of each status."""
    worker_list: list[WorkerLine]
    stuck: list[StuckAttempt]
    nobody_claims: bool
    """The queue has been waiting for long, and no worker is there."""
    rates: Mapping[str, float | None] = field(default_factory=dict)
    """Rollouts ended, and spans stored, a second, between this look and the one before."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def ended(self) -> int:
        return sum(self.rollouts.get(status, 0) for status in ("succeeded", "failed", "cancelled"))

    def rates_since(self, earlier: Picture) -> dict[str, float | None]:
        """What happened a second since an earlier look; rollouts that were queued again do not count as negative."""
        seconds = self.time - earlier.time
        if seconds <= 0:
            return dict.fromkeys(("rollouts_per_second", "spans_per_second"))
        return {
            "rollouts_per_second": max(0.0, (self.ended - earlier.ended) / seconds),
            "spans_per_second": max(0.0, (self.spans - earlier.spans) / seconds),
        }


async def look(store: LightningStore, server: str, stuck_after: float) -> Picture:
    """Look at a store once. `stuck_after`: seconds of silence after which an attempt counts as stuck."""
    statistics = await store.statistics()
    workers = await store.query_workers(sort_by="last_heartbeat_time", sort_order="desc", limit=_MOST_LISTED)
    stuck = await stuck_attempts(store, stuck_after)
    now = time.time()
    lines = [_worker_line(worker, now) for worker in workers]
    rollouts = statistics.get("rollouts_by_status", {})
    oldest = statistics.get("oldest_queued_age")
    there = sum(line.status != "gone" for line in lines)
    return Picture(
        server=server,
        time=now,
        uptime_seconds=statistics.get("uptime"),
        queued=rollouts.get("queuing", 0) + rollouts.get("requeuing", 0),
        oldest_queued_seconds=oldest,
        rollouts=rollouts,
        attempts=statistics.get("attempts_by_status", {}),
        expired_attempts=statistics.get("expired_attempts", {}),
        spans=statistics.get("total_spans", 0),
        workers=_count(lines, statistics),
        worker_list=sorted(
            (line for line in lines if line.status != "gone" or line.attempt_id is not None),
            key=lambda line: line.worker_id,
        ),
        stuck=stuck,
        nobody_claims=oldest is not None and oldest > stuck_after and not there,
    )


async def stuck_attempts(store: LightningStore, stuck_after: float) -> list[StuckAttempt]:
    """The attempts under way that nothing was heard of for longer than `stuck_after` seconds, longest silence first."""
    from lightning.types import AttemptedRollout

    under_way = await store.query_rollouts(status_in=["preparing", "running"], limit=_MOST_LISTED)
    now = time.time()
    stuck = [_silence(rollout, now) for rollout in under_way if isinstance(rollout, AttemptedRollout)]
    return sorted(
        (attempt for attempt in stuck if attempt.silent_seconds > stuck_after),
        key=lambda attempt: -attempt.silent_seconds,
    )


def _silence(rollout: AttemptedRollout, now: float) -> StuckAttempt:
    attempt, config = rollout.attempt, rollout.config
    return StuckAttempt(
        rollout_id=rollout.rollout_id,
        attempt_id=attempt.attempt_id,
        worker_id=attempt.worker_id,
        silent_seconds=now - (attempt.last_heartbeat_time or attempt.start_time),
        running_seconds=now - attempt.start_time,
        ends_by_itself=config.timeout_seconds is not None or config.unresponsive_seconds is not None,
    )


def _worker_line(worker: Worker, now: float) -> WorkerLine:
    heard = worker.last_heartbeat_time
    silent = None if heard is None else max(0.0, now - heard)
    status: str = worker.status
    if status == "unknown":
        status = "ready" if silent is not None and silent < _READY_WITHIN_SECONDS else "gone"
    stats = worker.heartbeat_stats or {}
    return WorkerLine(
        worker_id=worker.worker_id,
        status=status,
        rollout_id=worker.current_rollout_id,
        attempt_id=worker.current_attempt_id,
        silent_seconds=silent,
        cpu_percent=_percent(stats, "cpu"),
        memory_percent=_percent(stats, "memory"),
    )


def _percent(stats: Mapping[str, Any], part: str) -> float | None:
    """From a `system_snapshot`; other measurements may be anything."""
    measured = stats.get(part)
    value = measured.get("usage_percent") if isinstance(measured, dict) else None
    return float(value) if isinstance(value, (int, float)) else None


def _count(lines: list[WorkerLine], statistics: LightningStoreStatistics) -> dict[str, int]:
    counted = Counter(line.status for line in lines)
    counted["gone"] += max(0, statistics.get("total_workers", len(lines)) - len(lines))
    return {status: counted[status] for status in ("busy", "idle", "ready", "gone")}
