"""Records of those who do the work: workers, their heartbeats, and what they are told in reply."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lightning.types.record import Record
from lightning.types.rollouts import AttemptStatus

WorkerStatus = Literal["idle", "busy", "unknown"]


class Worker(Record):
    """A process (or part of one) that executes rollouts. Times are seconds since the epoch."""

    worker_id: str
    status: WorkerStatus = "unknown"
    """Derived: `busy` while it holds an attempt, `idle` after its last one ended, `unknown` before the first or when
    it has been silent for longer than its heartbeat allows."""
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


class AttemptRef(Record):
    """Names one attempt."""

    rollout_id: str
    attempt_id: str


class WorkerHeartbeat(Record):
    """A worker process saying that it lives, and what it is working on."""

    worker_id: str
    instance_id: str
    """Names the process: a restarted worker has its old `worker_id` but a new instance id."""
    attempts: list[AttemptRef] = Field(default_factory=list)
    """The attempts that this process is executing; their leases are refreshed."""
    heartbeat_stats: dict[str, Any] | None = None
    """Free-form measurements, such as `system_snapshot()`; None leaves the stored ones."""
    silent_after_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Silence after which the worker's status reads `unknown`: its interval + jitter + 1 s. None: the default."""


class CancelAttempt(Record):
    """The attempt is closed: interrupt its execution, report nothing, take the next task."""

    kind: Literal["cancel_attempt"] = "cancel_attempt"
    rollout_id: str
    attempt_id: str
    status: AttemptStatus
    """Why: the status in which the attempt was closed; `cancelled` too if it is another's now, or unknown."""


class Drain(Record):
    """Finish what is running, claim nothing more, then exit."""

    kind: Literal["drain"] = "drain"
    reason: str = ""


class Stop(Record):
    """The job is over: interrupt what is running and exit."""

    kind: Literal["stop"] = "stop"
    reason: str = ""


class ResourcesChanged(Record):
    """New resources are the latest ones now."""

    kind: Literal["resources_changed"] = "resources_changed"
    resources_id: str
    version: int


WorkerCommand = Annotated[CancelAttempt | Drain | Stop | ResourcesChanged, Field(discriminator="kind")]
"""What the store tells a worker, in a heartbeat's reply or pushed as soon as it happens."""


class HeartbeatReply(Record):
    """Answer to a heartbeat."""

    worker: Worker
    commands: list[WorkerCommand] = Field(default_factory=list)
    """A `CancelAttempt` for every attempt the heartbeat named that is no longer the worker's to execute."""
