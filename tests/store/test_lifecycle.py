"""Every rule of the lifecycle, every status with every event, as tables beside the code that must agree with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from lightning.store import lifecycle
from lightning.store.records import (
    AttemptRecord,
    ConfigRecord,
    Lease,
    RolloutRecord,
    SpanRecord,
    WorkerRecord,
)
from lightning.types import RolloutConfig

START, NOW = 1_000.0, 2_000.0
OPEN = ("preparing", "running")
CLOSED = ("succeeded", "failed", "timeout", "cancelled")
ATTEMPT_STATUSES: tuple[Any, ...] = (*OPEN, *CLOSED, "unresponsive")
FINAL = ("succeeded", "failed", "cancelled")
ROLLOUT_STATUSES: tuple[Any, ...] = ("queuing", "preparing", "running", "requeuing", *FINAL)
RETRY_ALL: Any = ["failed", "timeout", "unresponsive"]
CONFIGS = {
    "no retries": RolloutConfig(),
    "no condition": RolloutConfig(max_attempts=9),
    "attempts left": RolloutConfig(max_attempts=9, retry_condition=RETRY_ALL),
    "attempts used up": RolloutConfig(max_attempts=2, retry_condition=RETRY_ALL),
    "another condition": RolloutConfig(max_attempts=9, retry_condition=["timeout"]),
}
LIMITS = RolloutConfig(timeout_seconds=100, unresponsive_seconds=10)


def attempt(number: int, status: Any, **fields: Any) -> AttemptRecord:
    """An attempt as it would be stored."""
    end_time = None if status in OPEN else START + 1
    return AttemptRecord(f"at-{number}", number, status, START, end_time, **fields)


def rollout(status: Any, *attempts: AttemptRecord, config: RolloutConfig | None = None) -> RolloutRecord:
    """A rollout as it would be stored."""
    end_time = START + 1 if status in FINAL else None
    return RolloutRecord(
        "ro-1", b"null", status, START, ConfigRecord.of(config), end_time=end_time, attempts=attempts
    )


def every_case() -> Iterator[tuple[RolloutRecord, str, bool]]:
    """Every status of a rollout with two attempts and of either; which attempt it is, and if it is the latest."""
    for of_rollout, of_attempt, config in product(ROLLOUT_STATUSES, ATTEMPT_STATUSES, CONFIGS.values()):
        other = attempt(1, "failed")
        yield rollout(of_rollout, other, attempt(2, of_attempt), config=config), "at-2", True
        other = attempt(2, "preparing")
        yield rollout(of_rollout, attempt(1, of_attempt), other, config=config), "at-1", False


def status_of(record: RolloutRecord, attempt_id: str) -> str:
    """The status of one attempt."""
    found = record.find_attempt(attempt_id)
    assert found is not None
    return found.status


def followed(record: RolloutRecord, status: str) -> str:
    """The status of a rollout whose latest attempt has just got this one."""
    if record.status == "cancelled":
        return "cancelled"
    if status in (*OPEN, "succeeded"):
        return status
    left = len(record.attempts) < record.config.max_attempts
    return "requeuing" if left and status in record.config.retry_condition else "failed"


def check(
    before: RolloutRecord, after: RolloutRecord, attempt_id: str, is_latest: bool, expected: str
) -> None:
    """The attempt must have become `expected`, and the rollout must have followed if it had to."""
    was = status_of(before, attempt_id)
    context = f"{before.status}, {was}, latest={is_latest}"
    assert status_of(after, attempt_id) == expected, context
    moved = expected != was
    found = after.find_attempt(attempt_id)
    assert found is not None
    if moved:
        assert found.end_time == (None if expected in OPEN else NOW), context
    else:
        assert found.end_time == before.find_attempt(attempt_id).end_time, context  # type: ignore[union-attr]
    follows = moved and is_latest
    assert after.status == (followed(before, expected) if follows else before.status), context
    if follows and before.status != "cancelled":
        assert after.end_time == (NOW if after.status in FINAL else None), context
    else:
        assert after.end_time == before.end_time, context
    others = [a for a in after.attempts if a.attempt_id != attempt_id]
    assert others == [a for a in before.attempts if a.attempt_id != attempt_id], context


# --- Attempts --------------------------------------------------------------------------------------------------


def test_a_span_sets_running_and_revives() -> None:
    for before, attempt_id, is_latest in every_case():
        was = status_of(before, attempt_id)
        revived = was == "unresponsive" and is_latest
        expected = "running" if was == "preparing" or revived else was
        after, numbers = lifecycle.receive_spans(before, attempt_id, [_span(0)], NOW)
        check(before, after, attempt_id, is_latest, expected)
        heard = after.find_attempt(attempt_id)
        assert heard is not None
        assert (heard.last_heartbeat_time, heard.last_span_sequence_id, numbers) == (NOW, 1, [1])


def test_a_report_counts_while_it_is_not_too_late() -> None:
    for (before, attempt_id, is_latest), reported in product(every_case(), ATTEMPT_STATUSES):
        was = status_of(before, attempt_id)
        if reported == "cancelled":
            with pytest.raises(ValueError, match="cancel"):
                lifecycle.update_attempt(before, attempt_id, {"status": reported}, NOW)
            continue
        if was in CLOSED or reported == "preparing":
            expected = was
        elif was == "unresponsive" and reported == "running":
            expected = "running" if is_latest else was
        else:
            expected = reported
        after = lifecycle.update_attempt(before, attempt_id, {"status": reported}, NOW)
        check(before, after, attempt_id, is_latest, expected)


@pytest.mark.parametrize(
    ("age", "heard_before", "expected"),
    [
        (10.0, None, None),
        (10.001, None, "unresponsive"),
        (99.0, 10.0, None),
        (99.0, 10.001, "unresponsive"),
        (100.0, 1.0, None),
        (100.001, 1.0, "timeout"),
        (100.001, 11.0, "timeout"),
    ],
)
def test_an_open_attempt_expires_strictly_after_its_time(
    age: float, heard_before: float | None, expected: str | None
) -> None:
    heard = None if heard_before is None else NOW - heard_before
    for before, attempt_id, is_latest in every_case():
        was = status_of(before, attempt_id)
        config = ConfigRecord(100, 10, before.config.max_attempts, before.config.retry_condition)
        attempts = tuple(
            a._replace(start_time=NOW - age, last_heartbeat_time=heard)
            if a.attempt_id == attempt_id
            else a._replace(start_time=NOW)
            for a in before.attempts
        )
        record = before._replace(config=config, attempts=attempts)
        after = lifecycle.expire(record, NOW)
        check(record, after, attempt_id, is_latest, expected if was in OPEN and expected else was)
        deadline = lifecycle.next_deadline(record)
        passed = deadline is not None and deadline < NOW
        assert passed == (after != record)
        assert lifecycle.next_deadline(after) is None or lifecycle.next_deadline(after) >= NOW  # type: ignore[operator]


def test_all_attempts_of_a_rollout_can_expire_at_once() -> None:
    record = rollout("running", attempt(1, "running"), attempt(2, "running"), config=LIMITS)
    after = lifecycle.expire(record, NOW)
    assert [a.status for a in after.attempts] == ["timeout", "timeout"]
    assert after.status == "failed"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RolloutConfig(), None),
        (RolloutConfig(timeout_seconds=100), START + 100),
        (RolloutConfig(unresponsive_seconds=10), START + 55),
        (RolloutConfig(timeout_seconds=100, unresponsive_seconds=10), START + 55),
        (RolloutConfig(timeout_seconds=50, unresponsive_seconds=10), START + 50),
    ],
)
def test_the_next_deadline_is_the_first_of_all(config: RolloutConfig, expected: float | None) -> None:
    heard = attempt(1, "running", last_heartbeat_time=START + 45)
    later = attempt(2, "preparing")._replace(start_time=START + 60)
    assert lifecycle.next_deadline(rollout("running", heard, later, config=config)) == expected
    assert lifecycle.next_deadline(rollout("queuing", config=config)) is None
    assert lifecycle.next_deadline(rollout("failed", attempt(1, "failed"), config=config)) is None


def test_a_refresh_touches_open_attempts_only() -> None:
    for before, attempt_id, _ in every_case():
        after = lifecycle.refresh_attempt(before, attempt_id, NOW)
        if status_of(before, attempt_id) in OPEN:
            refreshed = before.find_attempt(attempt_id)._replace(last_heartbeat_time=NOW)  # type: ignore[union-attr]
            assert after.find_attempt(attempt_id) == refreshed
            assert after.status == before.status
        else:
            assert after is before
    assert lifecycle.refresh_attempt(before, "at-unknown", NOW) is before


def test_a_new_attempt_follows_all_others() -> None:
    for status in ROLLOUT_STATUSES:
        before = rollout(status, attempt(1, "failed"))
        if status == "cancelled":
            with pytest.raises(ValueError, match="ro-1"):
                lifecycle.begin_attempt(before, "at-2", "w-1", "i-1", NOW)
            continue
        after = lifecycle.begin_attempt(before, "at-2", "w-1", "i-1", NOW)
        assert (after.status, after.end_time) == ("preparing", None)
        assert after.attempts == (
            *before.attempts,
            AttemptRecord("at-2", 2, "preparing", NOW, worker_id="w-1", instance_id="i-1"),
        )


def test_another_worker_is_another_process() -> None:
    before = rollout("running", attempt(1, "running", worker_id="w-1", instance_id="i-1"))
    for worker_id, instance_id in (("w-1", "i-1"), ("w-2", None), (None, None)):
        after = lifecycle.update_attempt(before, "latest", {"worker_id": worker_id}, NOW)
        assert (after.attempts[0].worker_id, after.attempts[0].instance_id) == (worker_id, instance_id)


@pytest.mark.parametrize("attempt_id", ["at-unknown", "latest"])
def test_an_unknown_attempt_is_named(attempt_id: str) -> None:
    record = rollout("queuing")
    for change in (
        lambda: lifecycle.update_attempt(record, attempt_id, {"status": "failed"}, NOW),
        lambda: lifecycle.receive_spans(record, attempt_id, [], NOW),
        lambda: lifecycle.allocate_span_sequence_ids(record, attempt_id, 1),
    ):
        with pytest.raises(ValueError, match="ro-1" if attempt_id == "latest" else attempt_id):
            change()


# --- Sequence ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "given", "expected", "last_after"),
    [
        (0, [], [], 0),
        (0, [0, 0], [1, 2], 2),
        (5, [0, 3, 0], [6, 3, 7], 7),
        (5, [9, 0, 9, 0], [9, 10, 9, 11], 11),
    ],
)
def test_spans_are_numbered_on(last: int, given: list[int], expected: list[int], last_after: int) -> None:
    record = rollout("running", attempt(1, "running", last_span_sequence_id=last))
    after, numbers = lifecycle.receive_spans(record, "at-1", [_span(number) for number in given], NOW)
    assert (numbers, after.attempts[0].last_span_sequence_id) == (expected, last_after)
    taken = lifecycle.allocate_span_sequence_ids(after, "at-1", 3)
    assert lifecycle.last_span_sequence_id(taken, "at-1") == last_after + 3


def _span(sequence_id: int) -> SpanRecord:
    return SpanRecord("at-1", "a" * 16, sequence_id, b"")


# --- Rollouts --------------------------------------------------------------------------------------------------


def test_a_status_given_by_hand() -> None:
    for (before, attempt_id, is_latest), status in product(every_case(), ROLLOUT_STATUSES):
        was = status_of(before, attempt_id)
        if before.status == "cancelled" and status != "cancelled":
            with pytest.raises(ValueError, match="ro-1"):
                lifecycle.update_rollout(before, {"status": status, "mode": "test"}, NOW)
            continue
        after = lifecycle.update_rollout(before, {"status": status, "mode": "test"}, NOW)
        assert (after.status, after.mode) == (status, "test")
        if status == before.status:
            assert after == before._replace(mode="test")
            continue
        if status in FINAL:
            closes = was in OPEN or (was == "unresponsive" and is_latest)
            assert status_of(after, attempt_id) == (status if closes else was)
            assert after.find_attempt(attempt_id).end_time == (  # type: ignore[union-attr]
                NOW if closes else before.find_attempt(attempt_id).end_time  # type: ignore[union-attr]
            )
            assert after.end_time == (before.end_time or NOW)
        else:
            assert after.attempts == before.attempts
            assert after.end_time is None


# --- What follows for others -----------------------------------------------------------------------------------


def test_effects_on_the_queue_and_on_waiters() -> None:
    for was, status in product((None, *ROLLOUT_STATUSES), ROLLOUT_STATUSES):
        before = None if was is None else rollout(was, attempt(1, "running"))
        effects = lifecycle.effects(before, rollout(status, attempt(1, "running")))
        queued, finished = ("queuing", "requeuing"), FINAL
        assert effects.entered_queue == (status in queued and was not in queued)
        assert effects.finished == (status in finished and was not in finished)


def test_effects_on_workers() -> None:
    for was, status in product(ATTEMPT_STATUSES, ATTEMPT_STATUSES):
        for former, worker_id in product((None, "w-1", "w-2"), (None, "w-1", "w-2")):
            before = rollout("running", attempt(1, was, worker_id=former))
            after = rollout("running", attempt(1, status, worker_id=worker_id))
            effects = lifecycle.effects(before, after)
            had, has = former and was in OPEN, worker_id and status in OPEN
            same_hands = had and has and former == worker_id
            released = [(hold.worker_id, hold.status) for hold in effects.released]
            assert released == ([(former, status)] if had and not same_hands else [])
            acquired = [(hold.worker_id, hold.lease.attempt_id) for hold in effects.acquired]
            assert acquired == ([(worker_id, "at-1")] if has and not same_hands else [])


def test_who_may_go_on_executing() -> None:
    for before, attempt_id, is_latest in every_case():
        was = status_of(before, attempt_id)
        alive = was in OPEN or (was == "unresponsive" and is_latest)
        assert lifecycle.holds_attempt(before, attempt_id, "w-1", "i-1") == alive
    assert not lifecycle.holds_attempt(None, "at-1", "w-1", "i-1")
    assert not lifecycle.holds_attempt(before, "at-unknown", "w-1", "i-1")


@pytest.mark.parametrize(
    ("claimed_by", "asking", "expected"),
    [
        ((None, None), ("w-1", "i-1"), True),
        (("w-1", None), ("w-1", "i-1"), True),
        (("w-1", None), ("w-2", "i-1"), False),
        (("w-1", "i-1"), ("w-1", "i-1"), True),
        (("w-1", "i-1"), ("w-1", "i-2"), False),
        (("w-1", "i-1"), ("w-1", None), False),
    ],
)
def test_whose_attempt_it_is(
    claimed_by: tuple[str | None, str | None], asking: tuple[str, str | None], expected: bool
) -> None:
    worker_id, instance_id = claimed_by
    record = rollout("running", attempt(1, "running", worker_id=worker_id, instance_id=instance_id))
    assert lifecycle.holds_attempt(record, "at-1", *asking) == expected


# --- Workers ---------------------------------------------------------------------------------------------------


def lease(number: int) -> Lease:
    """Of one of a worker's attempts."""
    return Lease("ro-1", f"at-{number}", None)


def test_leases_come_and_go() -> None:
    worker = lifecycle.acquire(WorkerRecord("w-1"), lease(1), START)
    assert (worker.leases, worker.last_busy_time) == ((lease(1),), START)
    assert lifecycle.acquire(worker, lease(1), NOW) is worker
    both = lifecycle.acquire(worker, lease(2), NOW)
    assert (both.leases, both.last_busy_time) == ((lease(1), lease(2)), NOW)
    one = lifecycle.release(both, lifecycle.Hold("w-1", lease(1), "succeeded"), NOW)
    assert (one.leases, one.last_idle_time) == ((lease(2),), None)
    assert lifecycle.release(one, lifecycle.Hold("w-1", lease(1), "succeeded"), NOW) is one


@pytest.mark.parametrize("status", ATTEMPT_STATUSES)
def test_the_last_release_makes_idle_unless_it_went_silent(status: Any) -> None:
    worker = lifecycle.acquire(WorkerRecord("w-1"), lease(1), START)
    released = lifecycle.release(worker, lifecycle.Hold("w-1", lease(1), status), NOW)
    assert released.leases == ()
    assert released.last_idle_time == (None if status == "unresponsive" else NOW)


TIMES = ("last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time")


@pytest.mark.parametrize("heard_as", TIMES)
@pytest.mark.parametrize("limit", [None, 3.0])
def test_the_status_of_a_worker(heard_as: str, limit: float | None) -> None:
    silent_after = 11.5 if limit is None else limit
    heard: dict[str, Any] = {"silent_after_seconds": limit, heard_as: NOW}
    worker = WorkerRecord("w-1")._replace(**heard)
    for leases, when_alive in (
        ((lease(1),), "busy"),
        ((), "idle" if heard_as == "last_idle_time" else "unknown"),
    ):
        record = worker._replace(leases=leases)
        assert lifecycle.worker_status(record, NOW) == when_alive
        assert lifecycle.worker_status(record, NOW + silent_after) == when_alive
        late = math.nextafter(NOW + silent_after, math.inf)
        assert lifecycle.worker_status(record, late) == "unknown"


def test_a_worker_that_did_nothing_is_unknown() -> None:
    assert lifecycle.worker_status(WorkerRecord("w-1"), NOW) == "unknown"
