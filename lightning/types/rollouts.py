"""Records of the work itself: rollouts, their attempts, and the policy by which they are retried."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from lightning.types.record import Record

RolloutStatus = Literal["queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled"]
AttemptStatus = Literal["preparing", "running", "succeeded", "failed", "timeout", "unresponsive", "cancelled"]
RolloutMode = Literal["train", "val", "test"]


_MOST_ATTEMPTS = 2**32 - 1
"""What the wire has room for."""


class RolloutConfig(Record):
    """When an attempt is given up, and whether the rollout is then tried again."""

    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Longest run of one attempt, from its start, before it is closed as `timeout`. None: no limit."""
    unresponsive_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Longest silence (no span, no heartbeat) before an attempt is closed as `unresponsive`. None: no limit. An attempt
    that is found to be past both limits is closed as `timeout`."""
    max_attempts: int = Field(default=1, ge=1, le=_MOST_ATTEMPTS)
    """Attempts in all, the first one included."""
    retry_condition: list[AttemptStatus] = Field(default_factory=list)
    """Ends of an attempt after which the rollout is queued again: any of failed, timeout, unresponsive."""

    @classmethod
    def checked(cls, fields: dict[str, Any]) -> RolloutConfig:
        """A config of these fields. Raises `ValueError` naming the first that is wrong, in one line."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise ValueError(f"RolloutConfig.{field} is {first['input']!r}: {first['msg']}") from None


class Attempt(Record):
    """One execution of a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    """1 for the first attempt of the rollout, then 2, 3, …"""
    start_time: float
    """Seconds since the epoch."""
    end_time: float | None = None
    """Seconds since the epoch; None while the attempt is open."""
    status: AttemptStatus = "preparing"
    worker_id: str | None = None
    """Who executes it, where that is known."""
    last_heartbeat_time: float | None = None
    """When a span or a heartbeat for it was last received, in seconds since the epoch."""
    metadata: dict[str, Any] | None = None


class Rollout(Record):
    """One task, from the moment it is handed out until it ends."""

    rollout_id: str
    input: Any
    """What the agent is given: any JSON value."""
    start_time: float
    """When it was enqueued or started, in seconds since the epoch."""
    end_time: float | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    """The resources it runs against; None when there were none at the time."""
    status: RolloutStatus = "queuing"
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None


class AttemptedRollout(Rollout):
    """A rollout together with its latest attempt. Every read of a rollout that has attempts returns this form."""

    attempt: Attempt


class RolloutEvent(Record):
    """What somebody who watches rollouts is told: how one of them is now."""

    rollout: Rollout
    """The rollout after the change; an `AttemptedRollout` if it has attempts."""
    revision: int
    """The store's revision at the change. It counts up across all rollouts."""
    progress_revision: int
    """Everything that changed up to this revision has been told with this event: to go on from here, pass it as
    `after_revision`."""


class EnqueueRolloutRequest(Record):
    """One element of `LightningStore.enqueue_many_rollouts`; fields as in `LightningStore.enqueue_rollout`."""

    input: Any
    mode: RolloutMode | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
