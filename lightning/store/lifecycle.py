"""The lifecycle of rollouts, attempts and workers: every status rule of the contract, as pure functions.

Each function takes a record, what happened and the time, and returns the next record (the same one if nothing
changes) or raises `ValueError`. There is no I/O, no clock and nothing asynchronous here; `effects` reads off what
others must be told from the difference between two records.

```
attempt   preparing ──first span──▶ running ──▶ succeeded | failed   the runner says so
              │                        │
              └────────────────────────┴──────▶ timeout | unresponsive | cancelled
                                                unresponsive ──span──▶ running, while no newer attempt exists

rollout   queuing ──claim──▶ preparing ──▶ running ──▶ succeeded | failed | cancelled
                                 ▲            │
                                 └─ requeuing ◀┘  the attempt's end is in retry_condition, attempts are left
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

from lightning.store.arguments import unknown_attempt
from lightning.store.contract import TERMINAL_ATTEMPT_STATUSES, TERMINAL_ROLLOUT_STATUSES
from lightning.store.records import AttemptRecord, Lease, RolloutRecord, SpanRecord, WorkerRecord
from lightning.types import AttemptStatus, RolloutStatus, WorkerStatus

QUEUED_STATUSES: frozenset[str] = frozenset({"queuing", "requeuing"})
RETRYABLE_STATUSES: frozenset[str] = frozenset({"failed", "timeout", "unresponsive"})
CLOSED_FOR_GOOD_STATUSES: frozenset[str] = TERMINAL_ATTEMPT_STATUSES - {"unresponsive"}

MAX_SPAN_SEQUENCE_ID = 2**63 - 1
"""What the wire and every backend can hold."""

DEFAULT_SILENT_AFTER_SECONDS = 11.5
"""A worker's default heartbeat interval (10 s) + jitter (0.5 s) + 1 s."""


# --- Reading a record ------------------------------------------------------------------------------------------


def is_queued(record: RolloutRecord) -> bool:
    """Whether the rollout waits in the queue."""
    return record.status in QUEUED_STATUSES


def queued_since(record: RolloutRecord) -> float:
    """Since when a queued rollout has been waiting: its creation, or the end of its last attempt."""
    ends = (attempt.end_time for attempt in record.attempts if attempt.end_time is not None)
    return max((record.start_time, *ends))


def is_finished(record: RolloutRecord) -> bool:
    """Whether the rollout's status is terminal."""
    return record.status in TERMINAL_ROLLOUT_STATUSES


def closed_attempts(before: RolloutRecord, after: RolloutRecord) -> list[AttemptStatus]:
    """What became of those attempts that a change closed."""
    pairs = zip(before.attempts, after.attempts, strict=False)
    return [new.status for old, new in pairs if is_open(old) and not is_open(new)]


def is_open(attempt: AttemptRecord) -> bool:
    """Whether somebody may be executing the attempt."""
    return attempt.status not in TERMINAL_ATTEMPT_STATUSES


def next_deadline(record: RolloutRecord) -> float | None:
    """The time after which `expire` will change this record, in seconds since the epoch; None: never."""
    if record.config.timeout_seconds is None and record.config.unresponsive_seconds is None:
        return None
    deadlines = [
        deadline
        for attempt in record.attempts
        if is_open(attempt)
        for deadline, _ in _deadlines(record, attempt)
    ]
    return min(deadlines, default=None)


def _deadlines(record: RolloutRecord, attempt: AttemptRecord) -> list[tuple[float, AttemptStatus]]:
    deadlines: list[tuple[float, AttemptStatus]] = []
    if record.config.timeout_seconds is not None:
        deadlines.append((attempt.start_time + record.config.timeout_seconds, "timeout"))
    if record.config.unresponsive_seconds is not None:
        heard = attempt.start_time if attempt.last_heartbeat_time is None else attempt.last_heartbeat_time
        deadlines.append((heard + record.config.unresponsive_seconds, "unresponsive"))
    return deadlines


# --- Attempts ---------------------------------------------------------------------------------------------------


def begin_attempt(
    record: RolloutRecord, attempt_id: str, worker_id: str | None, instance_id: str | None, now: float
) -> RolloutRecord:
    """A claim or a manual retry: the rollout leaves the queue with its next attempt."""
    if record.status == "cancelled":
        raise ValueError(f"rollout {record.rollout_id!r} is cancelled and cannot be attempted again")
    attempt = AttemptRecord(
        attempt_id=attempt_id,
        sequence_id=len(record.attempts) + 1,
        status="preparing",
        start_time=now,
        worker_id=worker_id,
        instance_id=instance_id,
    )
    return record._replace(status="preparing", end_time=None, attempts=(*record.attempts, attempt))


def receive_spans(
    record: RolloutRecord, attempt_id: str, spans: Sequence[SpanRecord], now: float
) -> tuple[RolloutRecord, list[int]]:
    """Spans arrived, none of which the attempt has yet: number them and take them as a sign of life.

    Returns:
        The next record and the sequence id of each span.

    Raises:
        ValueError: There are no sequence ids left.
        UnknownIdError: The rollout has no such attempt, or it is called `"latest"`: late spans would get to another.
    """
    attempt = _require_attempt(record, attempt_id)
    if attempt.attempt_id != attempt_id:
        raise unknown_attempt(record.rollout_id, attempt_id)
    last = attempt.last_span_sequence_id
    sequence_ids = []
    for span in spans:
        sequence_id = span.sequence_id or last + 1
        sequence_ids.append(sequence_id)
        last = max(last, sequence_id)
    _check_sequence_id(attempt, last)
    heard = attempt._replace(last_span_sequence_id=last, last_heartbeat_time=now)
    if attempt.status == "preparing" or (
        attempt.status == "unresponsive" and attempt is record.latest_attempt
    ):
        heard = heard._replace(status="running", end_time=None)
    return _with_attempt(record, attempt, heard, now), sequence_ids


def allocate_span_sequence_ids(record: RolloutRecord, attempt_id: str, count: int) -> RolloutRecord:
    """Set the next `count` sequence ids aside; they end at the attempt's new `last_span_sequence_id`."""
    attempt = _require_attempt(record, attempt_id)
    last = attempt.last_span_sequence_id + count
    _check_sequence_id(attempt, last)
    taken = attempt._replace(last_span_sequence_id=last)
    return record._replace(attempts=_swap(record.attempts, attempt, taken))


def _check_sequence_id(attempt: AttemptRecord, sequence_id: int) -> None:
    if sequence_id > MAX_SPAN_SEQUENCE_ID:
        raise ValueError(
            f"attempt {attempt.attempt_id!r} has no sequence ids left: they end at {MAX_SPAN_SEQUENCE_ID}, "
            "to which its spans have come"
        )


def last_span_sequence_id(record: RolloutRecord, attempt_id: str) -> int:
    """The highest sequence id given to a span of the attempt so far."""
    return _require_attempt(record, attempt_id).last_span_sequence_id


def update_attempt(
    record: RolloutRecord, attempt_id: str, changes: dict[str, Any], now: float
) -> RolloutRecord:
    """A report on an attempt. `changes` holds the fields to replace, by name: status, worker_id,
    last_heartbeat_time, metadata."""
    attempt = _require_attempt(record, attempt_id)
    changed = attempt._replace(**{name: value for name, value in changes.items() if name != "status"})
    if "worker_id" in changes and changes["worker_id"] != attempt.worker_id:
        changed = changed._replace(instance_id=None)  # it is another worker's now, in whatever process
    status: AttemptStatus | None = changes.get("status")
    if status == "cancelled":
        raise ValueError(
            "an attempt is cancelled by cancelling its rollout: update_rollout(status='cancelled')"
        )
    if status is not None and _may_become(record, attempt, status):
        changed = _with_status(changed, status, now)
    return _with_attempt(record, attempt, changed, now)


def _may_become(record: RolloutRecord, attempt: AttemptRecord, status: AttemptStatus) -> bool:
    """Whether a reported status still counts; one that comes too late changes nothing."""
    if attempt.status in CLOSED_FOR_GOOD_STATUSES or status == attempt.status:
        return False
    if status in TERMINAL_ATTEMPT_STATUSES:
        return True
    if status == "preparing":
        return False  # never back
    return is_open(attempt) or attempt is record.latest_attempt  # as a span does


def refresh_attempt(record: RolloutRecord, attempt_id: str, now: float) -> RolloutRecord:
    """The worker that executes the attempt was heard of."""
    attempt = record.find_attempt(attempt_id)
    if attempt is None or not is_open(attempt):
        return record
    return record._replace(
        attempts=_swap(record.attempts, attempt, attempt._replace(last_heartbeat_time=now))
    )


def holds_attempt(
    record: RolloutRecord | None, attempt_id: str, worker_id: str, instance_id: str | None
) -> bool:
    """Whether this worker process may go on executing the attempt.

    An `unresponsive` one it may, as long as it is the latest: its next span revives it.
    """
    attempt = None if record is None else record.find_attempt(attempt_id)
    if record is None or attempt is None or attempt.status in CLOSED_FOR_GOOD_STATUSES:
        return False
    if attempt.worker_id not in (None, worker_id) or attempt.instance_id not in (None, instance_id):
        return False
    return is_open(attempt) or attempt is record.latest_attempt


def expire(record: RolloutRecord, now: float) -> RolloutRecord:
    """Close the open attempts whose time is up. A deadline that has passed by exactly nothing has not passed."""
    for attempt in record.attempts:
        if not is_open(attempt):
            continue
        passed = [status for deadline, status in _deadlines(record, attempt) if now > deadline]
        if passed:
            record = _with_attempt(record, attempt, _with_status(attempt, passed[0], now), now)
    return record


# --- Rollouts ---------------------------------------------------------------------------------------------------


def update_rollout(record: RolloutRecord, changes: dict[str, Any], now: float) -> RolloutRecord:
    """A change by hand. `changes` holds the fields to replace, by name: input, mode, resources_id, status, config,
    metadata (payloads encoded)."""
    changed = record._replace(**{name: value for name, value in changes.items() if name != "status"})
    status: RolloutStatus | None = changes.get("status")
    if status is None or status == record.status:
        return changed
    if record.status == "cancelled":
        raise ValueError(f"rollout {record.rollout_id!r} is cancelled and cannot become {status}")
    if status in TERMINAL_ROLLOUT_STATUSES:
        # Whoever executes it is no longer wanted, and no attempt may be left that the rollout would follow elsewhere.
        attempts = tuple(
            _with_status(attempt, _attempt_status_for(status), now)
            if is_open(attempt) or (attempt is record.latest_attempt and attempt.status == "unresponsive")
            else attempt
            for attempt in record.attempts
        )
        end_time = now if record.end_time is None else record.end_time
        return changed._replace(status=status, end_time=end_time, attempts=attempts)
    if status in QUEUED_STATUSES and is_queued(record):
        return changed._replace(status=status)
    return changed._replace(status=status, end_time=None)


def _attempt_status_for(status: RolloutStatus) -> AttemptStatus:
    mapping: dict[str, AttemptStatus] = {
        "succeeded": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
    }
    return mapping[status]


def _follow(record: RolloutRecord, attempt: AttemptRecord, now: float) -> RolloutRecord:
    """The rollout's record after the status of its latest attempt became that of `attempt`."""
    if record.status == "cancelled":
        return record
    status: RolloutStatus
    if attempt.status in ("preparing", "running", "succeeded"):
        status = attempt.status  # these three are statuses of both
    elif attempt.status == "cancelled":
        status = "cancelled"
    elif attempt.status in record.config.retry_condition and attempt.sequence_id < record.config.max_attempts:
        status = "requeuing"
    else:
        status = "failed"
    return record._replace(status=status, end_time=now if status in TERMINAL_ROLLOUT_STATUSES else None)


def _with_attempt(record: RolloutRecord, old: AttemptRecord, new: AttemptRecord, now: float) -> RolloutRecord:
    if new == old:
        return record
    follows = old is record.latest_attempt and new.status != old.status
    record = record._replace(attempts=_swap(record.attempts, old, new))
    return _follow(record, new, now) if follows else record


def _with_status(attempt: AttemptRecord, status: AttemptStatus, now: float) -> AttemptRecord:
    return attempt._replace(status=status, end_time=now if status in TERMINAL_ATTEMPT_STATUSES else None)


def _swap(
    attempts: tuple[AttemptRecord, ...], old: AttemptRecord, new: AttemptRecord
) -> tuple[AttemptRecord, ...]:
    index = old.sequence_id - 1
    return (*attempts[:index], new, *attempts[index + 1 :])


def _require_attempt(record: RolloutRecord, attempt_id: str) -> AttemptRecord:
    attempt = record.find_attempt(attempt_id)
    if attempt is None:
        if attempt_id == "latest":
            raise ValueError(f"rollout {record.rollout_id!r} has no attempts yet")
        raise unknown_attempt(record.rollout_id, attempt_id)
    return attempt


# --- Effects ----------------------------------------------------------------------------------------------------


class Hold(NamedTuple):
    """An attempt in the hands of a worker."""

    worker_id: str
    lease: Lease
    status: AttemptStatus


class Effects(NamedTuple):
    """What a change means to others."""

    entered_queue: bool
    finished: bool
    acquired: tuple[Hold, ...]
    """Attempts that a worker holds since."""
    released: tuple[Hold, ...]
    """Attempts that a worker held until now, with the status they have now."""
    changed: bool
    """Whether somebody who watches the rollout sees a difference."""


def effects(before: RolloutRecord | None, after: RolloutRecord) -> Effects:
    """What follows from a rollout's change; `before` is None for a new one."""
    acquired: list[Hold] = []
    released: list[Hold] = []
    known = () if before is None else before.attempts
    if known is not after.attempts:
        for old, new in zip_longest(known, after.attempts):  # attempts are added, never taken away
            if old is new:
                continue
            held_before, holds = _holder(old), _holder(new)
            if held_before == holds:
                continue
            if held_before is not None:
                released.append(_hold(after, old, held_before)._replace(status=new.status))
            if holds is not None:
                acquired.append(_hold(after, new, holds))
    return Effects(
        entered_queue=is_queued(after) and not (before is not None and is_queued(before)),
        finished=is_finished(after) and not (before is not None and is_finished(before)),
        acquired=tuple(acquired),
        released=tuple(released),
        changed=before is not None and visible(before) != visible(after),
    )


def visible(record: RolloutRecord) -> tuple[object, ...]:
    """What a watcher sees of a rollout. That its latest attempt was heard of again is no news."""
    seen = (
        record.status,
        record.end_time,
        record.mode,
        record.resources_id,
        record.input,
        record.metadata,
        record.config,
    )
    latest = record.latest_attempt
    if latest is None:
        return seen
    return (*seen, latest.attempt_id, latest.status, latest.end_time, latest.worker_id, latest.metadata)


def _holder(attempt: AttemptRecord | None) -> str | None:
    """The worker that has the attempt in its hands."""
    return attempt.worker_id if attempt is not None and is_open(attempt) else None


def _hold(record: RolloutRecord, attempt: AttemptRecord, worker_id: str) -> Hold:
    lease = Lease(record.rollout_id, attempt.attempt_id, attempt.instance_id)
    return Hold(worker_id, lease, attempt.status)


# --- Workers ----------------------------------------------------------------------------------------------------


def settle(
    before: RolloutRecord | None, after: RolloutRecord, now: float
) -> list[tuple[str, Callable[[WorkerRecord], WorkerRecord]]]:
    """What a rollout's change (`before` is None for a new one) makes of the workers that hold its attempts: their ids,
    and what is to be done to their records, which comes to the same when it is done again."""
    happened = effects(before, after)
    changes: list[tuple[str, Callable[[WorkerRecord], WorkerRecord]]] = [
        (hold.worker_id, partial(release, hold=hold, now=now)) for hold in happened.released
    ]
    changes.extend(
        (hold.worker_id, partial(acquire, lease=hold.lease, now=now)) for hold in happened.acquired
    )
    return changes


def acquire(worker: WorkerRecord, lease: Lease, now: float) -> WorkerRecord:
    """The worker began to execute an attempt."""
    if any(held.attempt_id == lease.attempt_id for held in worker.leases):
        return worker
    return worker._replace(leases=(*worker.leases, lease), last_busy_time=now)


def release(worker: WorkerRecord, hold: Hold, now: float) -> WorkerRecord:
    """An attempt the worker held is closed, or another's. One that went silent left the worker not idle but gone."""
    leases = tuple(held for held in worker.leases if held.attempt_id != hold.lease.attempt_id)
    if len(leases) == len(worker.leases):
        return worker
    idle = not leases and hold.status != "unresponsive"
    return worker._replace(leases=leases, last_idle_time=now if idle else worker.last_idle_time)


def worker_status(worker: WorkerRecord, now: float) -> WorkerStatus:
    """`busy` or `idle` by what it did last, `unknown` if it did nothing yet or has not been heard of for too long."""
    heard = [
        moment
        for moment in (
            worker.last_heartbeat_time,
            worker.last_dequeue_time,
            worker.last_busy_time,
            worker.last_idle_time,
        )
        if moment is not None
    ]
    limit = worker.silent_after_seconds or DEFAULT_SILENT_AFTER_SECONDS
    if not heard or now - max(heard) > limit:
        return "unknown"
    if worker.leases:
        return "busy"
    return "unknown" if worker.last_idle_time is None else "idle"
