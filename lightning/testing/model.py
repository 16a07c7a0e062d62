"""The store in a page: what every store must do, said as simply as it can be, for a machine to compare with.

A model knows no payloads and makes no identifiers; it is told those that the store made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning.types import AttemptStatus, RolloutConfig, RolloutStatus

OPEN = ("preparing", "running")
FINAL = ("succeeded", "failed", "cancelled")
QUEUED = ("queuing", "requeuing")
SILENT_AFTER_SECONDS = 11.5


@dataclass
class ModelAttempt:
    """One execution of a rollout."""

    attempt_id: str
    start: float
    worker_id: str | None
    instance_id: str | None = None
    status: AttemptStatus = "preparing"
    heard: float | None = None
    spans: dict[str, int] = field(default_factory=dict)
    last_number: int = 0


@dataclass
class ModelRollout:
    """One unit of work."""

    rollout_id: str
    config: RolloutConfig
    status: RolloutStatus = "queuing"
    attempts: list[ModelAttempt] = field(default_factory=list)


@dataclass
class ModelWorker:
    """Who executes attempts. Which ones is read off the attempts."""

    heard: float
    was_idle: bool = False


class Model:
    """All rollouts, attempts and workers, and the queue."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.rollouts: dict[str, ModelRollout] = {}
        self.queue: list[str] = []
        self.workers: dict[str, ModelWorker] = {}

    def enqueue(self, rollout_id: str, config: RolloutConfig) -> ModelRollout:
        rollout = self.rollouts[rollout_id] = ModelRollout(rollout_id, config)
        self.queue.append(rollout_id)
        return rollout

    def begin(self, rollout: ModelRollout, attempt_id: str, worker: str | None, instance: str | None) -> None:
        rollout.attempts.append(ModelAttempt(attempt_id, self.now, worker, instance))
        self.become(rollout, "preparing")
        self.hear_of(worker)

    def become(self, rollout: ModelRollout, status: RolloutStatus) -> None:
        if (rollout.rollout_id in self.queue) != (status in QUEUED):
            (self.queue.append if status in QUEUED else self.queue.remove)(rollout.rollout_id)
        rollout.status = status

    def close(self, rollout: ModelRollout, attempt: ModelAttempt, status: AttemptStatus) -> None:
        """The attempt gets another status, and the rollout follows its latest one."""
        was, attempt.status = attempt.status, status
        if was in OPEN and status not in OPEN:
            self.let_go(attempt.worker_id, status)
        elif was not in OPEN and status in OPEN:
            self.hear_of(attempt.worker_id)
        if attempt is not rollout.attempts[-1] or rollout.status == "cancelled" or was == status:
            return
        retry = (
            status in rollout.config.retry_condition and len(rollout.attempts) < rollout.config.max_attempts
        )
        follows: RolloutStatus = "requeuing" if retry else "failed"
        self.become(rollout, status if status in (*OPEN, "succeeded") else follows)  # type: ignore[arg-type]

    def span(self, rollout: ModelRollout, attempt: ModelAttempt, span_id: str, number: int) -> int | None:
        """The span's number; None if it is a duplicate."""
        attempt.heard = self.now
        stored = None
        if span_id not in attempt.spans:
            stored = attempt.spans[span_id] = number or attempt.last_number + 1
            attempt.last_number = max(attempt.last_number, stored)
        is_latest = attempt is rollout.attempts[-1]
        if attempt.status == "preparing" or (attempt.status == "unresponsive" and is_latest):
            self.close(rollout, attempt, "running")
        return stored

    def report(self, rollout: ModelRollout, attempt: ModelAttempt, status: AttemptStatus) -> None:
        is_latest = attempt is rollout.attempts[-1]
        if status in OPEN:
            may = status == "running" and (
                attempt.status in OPEN or (attempt.status == "unresponsive" and is_latest)
            )
        else:
            may = attempt.status in (*OPEN, "unresponsive")
        if may:
            self.close(rollout, attempt, status)

    def update(self, rollout: ModelRollout, status: RolloutStatus) -> None:
        """A status given by hand, which the rollout does not have yet."""
        if status in FINAL:
            self.become(rollout, "cancelled")  # so that it follows no attempt
            for attempt in rollout.attempts:
                silent = attempt is rollout.attempts[-1] and attempt.status == "unresponsive"
                if attempt.status in OPEN or silent:
                    self.close(rollout, attempt, status)  # type: ignore[arg-type]
        self.become(rollout, status)

    def hand_over(self, attempt: ModelAttempt, worker: str | None) -> None:
        if attempt.worker_id == worker:
            return
        former, attempt.worker_id, attempt.instance_id = attempt.worker_id, worker, None
        if attempt.status in OPEN:
            self.let_go(former, attempt.status)
            self.hear_of(worker)

    def heartbeat(self, worker: str, instance: str | None, named: list[ModelAttempt] | None) -> None:
        """`named` are the attempts that a process says it executes; None: whatever the worker holds by name alone."""
        self.hear_of(worker)
        for attempt in self.held(worker) if named is None else named:
            mine = attempt.worker_id in (None, worker) and attempt.instance_id in (None, instance)
            if attempt.status in OPEN and mine:
                attempt.heard = self.now

    def advance(self, now: float) -> None:
        """Time passes; rollouts expire in the order in which they became due."""
        self.now = now
        due: list[tuple[float, ModelRollout]] = []
        for rollout in self.rollouts.values():
            deadlines = [when for attempt in rollout.attempts for when, _ in self.deadlines(rollout, attempt)]
            due.append((min(deadlines, default=now), rollout))
        for _, rollout in sorted(due, key=lambda each: each[0]):
            for attempt in rollout.attempts:
                passed = [status for when, status in self.deadlines(rollout, attempt) if when < now]
                if passed:
                    self.close(rollout, attempt, passed[0])

    def deadlines(self, rollout: ModelRollout, attempt: ModelAttempt) -> list[tuple[float, AttemptStatus]]:
        found: list[tuple[float, AttemptStatus]] = []
        if attempt.status in OPEN and rollout.config.timeout_seconds:
            found.append((attempt.start + rollout.config.timeout_seconds, "timeout"))
        if attempt.status in OPEN and rollout.config.unresponsive_seconds:
            heard = attempt.start if attempt.heard is None else attempt.heard
            found.append((heard + rollout.config.unresponsive_seconds, "unresponsive"))
        return found

    def held(self, worker: str) -> list[ModelAttempt]:
        every = [a for r in self.rollouts.values() for a in r.attempts]
        return [a for a in every if a.worker_id == worker and a.status in OPEN]

    def hear_of(self, worker: str | None) -> None:
        if worker is not None:
            self.workers.setdefault(worker, ModelWorker(self.now)).heard = self.now

    def let_go(self, worker: str | None, status: AttemptStatus) -> None:
        if worker is not None and status != "unresponsive" and not self.held(worker):
            self.hear_of(worker)
            self.workers[worker].was_idle = True

    def worker_status(self, worker: str) -> str:
        known = self.workers[worker]
        if self.now - known.heard > SILENT_AFTER_SECONDS:
            return "unknown"
        return "busy" if self.held(worker) else "idle" if known.was_idle else "unknown"
