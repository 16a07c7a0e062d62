"""Random histories: a machine that does the same to a store and to the model, and compares them after every step.

```python
class MyMachine(StoreMachine):
    def make_store(self) -> LightningStore:
        return MyStore(clock=self.clock)

TestMyStore = MyMachine.TestCase
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning.store.contract import LightningStore
from lightning.testing.clock import FakeClock
from lightning.testing.model import FINAL, Model, ModelAttempt, ModelRollout
from lightning.testing.records import make_span
from lightning.types import Attempt, AttemptRef, RolloutConfig, WorkerHeartbeat

T = TypeVar("T")

_STEP_DEADLINE_SECONDS = 30.0
_TIE_BREAKER_SECONDS = 2.0**-12
"""Added to limits, another multiple for each rollout: deadlines that coincide expire in no particular order."""

indexes = st.integers(min_value=0, max_value=1_000)
workers = st.sampled_from([None, "w-1", "w-2"])
named_workers = st.sampled_from(["w-1", "w-2"])
instances = st.sampled_from(["i-1", "i-2"])
limits = st.sampled_from([None, 2, 5])
seconds = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 12.0])
retry_conditions = st.lists(st.sampled_from(["failed", "timeout", "unresponsive"]), unique=True, max_size=3)
reported = st.sampled_from(["preparing", "running", "succeeded", "failed", "timeout", "unresponsive"])
given_by_hand = st.sampled_from(
    ["queuing", "requeuing", "preparing", "running", "succeeded", "failed", "cancelled"]
)


class StoreMachine(RuleBasedStateMachine):
    """Enqueues, claims, reports, sends spans and heartbeats, updates, and lets time pass, at random.

    A subclass says which store, by `make_store` or, if it takes awaiting, `open_store`.
    """

    async def open_store(self, stack: AsyncExitStack) -> LightningStore:
        """An empty store on `self.clock`; what must be closed afterwards goes onto `stack`, the store as well."""
        store = self.make_store()
        stack.push_async_callback(store.close)
        return store

    def make_store(self) -> LightningStore:
        """An empty store on `self.clock`."""
        raise NotImplementedError(f"{type(self).__name__} must define make_store or open_store")

    for_runners: ClassVar[bool] = True
    """Whether the store has the verbs for runners at their best (see `RunnerContract`), or just the defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.model = Model(self.clock.now())
        self.made = 0
        self.turn = 0
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        try:
            self.store = self.run(self.open_store(self.stack))
        except BaseException:
            self.loop.close()
            raise

    @property
    def steps(self) -> int:
        """How many steps this history has so far."""
        return self.turn

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Have the store's event loop do something."""
        return self.loop.run_until_complete(asyncio.wait_for(step, _STEP_DEADLINE_SECONDS))

    def teardown(self) -> None:
        """At the end everything is compared, the queue by emptying it."""
        try:
            self.compare_spans()
            claimed = self.run(self.store.dequeue_many_rollouts(limit=10_000))
            assert [rollout.rollout_id for rollout in claimed] == self.model.queue
        finally:
            self.run(self.stack.aclose())
            self.loop.close()

    # --- Handing out work ---

    @rule(
        timeout=limits,
        unresponsive=limits,
        attempts=st.integers(1, 3),
        retry=retry_conditions,
        start=st.booleans(),
        worker=workers,
    )
    def create(
        self, timeout: Any, unresponsive: Any, attempts: int, retry: Any, start: bool, worker: str | None
    ) -> None:
        self.made += 1
        extra = self.made * _TIE_BREAKER_SECONDS
        config = RolloutConfig(
            timeout_seconds=timeout and timeout + extra,
            unresponsive_seconds=unresponsive and unresponsive + extra,
            max_attempts=attempts,
            retry_condition=retry,
        )
        if not start:
            self.model.enqueue(
                self.run(self.store.enqueue_rollout(self.made, config=config)).rollout_id, config
            )
            return
        started = self.run(self.store.start_rollout(self.made, config=config, worker_id=worker))
        rollout = self.model.enqueue(started.rollout_id, config)
        self.model.begin(rollout, started.attempt.attempt_id, worker, None)

    @rule(worker=workers, limit=st.integers(0, 3))
    def dequeue(self, worker: str | None, limit: int) -> None:
        claimed = self.run(self.store.dequeue_many_rollouts(limit=limit, worker_id=worker))
        self.model.hear_of(worker)
        self.take_claimed(claimed, limit, worker, None)

    @precondition(lambda self: self.for_runners)
    @rule(worker=named_workers, instance=instances)
    def claim(self, worker: str, instance: str) -> None:
        claimed = self.run(
            self.store.claim_rollouts(limit=2, worker_id=worker, instance_id=instance, timeout=0)
        )
        self.model.hear_of(worker)
        self.take_claimed(claimed, 2, worker, instance)

    def take_claimed(self, claimed: Any, limit: int, worker: str | None, instance: str | None) -> None:
        assert [rollout.rollout_id for rollout in claimed] == self.model.queue[:limit]
        for rollout in claimed:
            self.model.begin(
                self.model.rollouts[rollout.rollout_id], rollout.attempt.attempt_id, worker, instance
            )

    @precondition(lambda self: self.model.rollouts)
    @rule(index=indexes, worker=workers)
    def start_attempt(self, index: int, worker: str | None) -> None:
        rollout = self.some_rollout(index)
        if rollout.status == "cancelled":
            self.refused(self.store.start_attempt(rollout.rollout_id, worker))
            return
        started = self.run(self.store.start_attempt(rollout.rollout_id, worker))
        assert started.attempt.sequence_id == len(rollout.attempts) + 1
        self.model.begin(rollout, started.attempt.attempt_id, worker, None)

    # --- Recording what happened ---

    @precondition(lambda self: self.attempts())
    @rule(index=indexes, span=st.integers(0, 5), number=st.sampled_from([0, 0, 0, 3, 7]))
    def add_span(self, index: int, span: int, number: int) -> None:
        rollout, attempt = self.some_attempt(index)
        ids = Attempt(
            rollout_id=rollout.rollout_id, attempt_id=attempt.attempt_id, sequence_id=1, start_time=0
        )
        stored = self.run(self.store.add_span(make_span(ids, span_id=f"{span:016x}", sequence_id=number)))
        expected = self.model.span(rollout, attempt, f"{span:016x}", number)
        assert (stored and stored.sequence_id) == expected

    @precondition(lambda self: self.attempts())
    @rule(index=indexes)
    def take_number(self, index: int) -> None:
        rollout, attempt = self.some_attempt(index)
        attempt.last_number += 1
        number = self.run(self.store.get_next_span_sequence_id(rollout.rollout_id, attempt.attempt_id))
        assert number == attempt.last_number

    @precondition(lambda self: self.attempts())
    @rule(index=indexes, status=reported, late=st.booleans())
    def report(self, index: int, status: Any, late: bool) -> None:
        rollout, attempt = self.some_attempt(index)
        if not late:
            attempt = rollout.attempts[-1]
        named = "latest" if attempt is rollout.attempts[-1] and index % 2 else attempt.attempt_id
        returned = self.run(self.store.update_attempt(rollout.rollout_id, named, status=status))
        self.model.report(rollout, attempt, status)
        assert (returned.attempt_id, returned.status) == (attempt.attempt_id, attempt.status)

    @precondition(lambda self: self.attempts())
    @rule(index=indexes, worker=workers)
    def hand_over(self, index: int, worker: str | None) -> None:
        rollout, attempt = self.some_attempt(index)
        self.run(self.store.update_attempt(rollout.rollout_id, attempt.attempt_id, worker_id=worker))
        self.model.hand_over(attempt, worker)

    @precondition(lambda self: self.model.rollouts)
    @rule(index=indexes, status=given_by_hand)
    def update(self, index: int, status: Any) -> None:
        rollout = self.some_rollout(index)
        if rollout.status == "cancelled" != status:
            self.refused(self.store.update_rollout(rollout.rollout_id, status=status))
            return
        self.run(self.store.update_rollout(rollout.rollout_id, status=status))
        if rollout.status != status:
            self.model.update(rollout, status)

    # --- Signs of life, and time ---

    @rule(worker=named_workers)
    def update_worker(self, worker: str) -> None:
        self.run(self.store.update_worker(worker))
        self.model.heartbeat(worker, None, None)

    @precondition(lambda self: self.for_runners)
    @rule(worker=named_workers, instance=instances, picks=st.lists(indexes, max_size=3))
    def send_heartbeat(self, worker: str, instance: str, picks: list[int]) -> None:
        named = [self.some_attempt(index) for index in picks if self.attempts()]
        refs = [AttemptRef(rollout_id=r.rollout_id, attempt_id=a.attempt_id) for r, a in named]
        beat = WorkerHeartbeat(worker_id=worker, instance_id=instance, attempts=refs)
        self.run(self.store.send_heartbeat(beat))
        self.model.heartbeat(worker, instance, [attempt for _, attempt in named])

    @rule(by=seconds)
    def advance(self, by: float) -> None:
        self.clock.advance(by)

    # --- Comparing ---

    @invariant()
    def store_and_model_agree(self) -> None:
        """Everything that can be compared at little cost, after every step."""
        self.model.advance(self.clock.now())  # what a step revived may have been overdue at once
        self.turn += 1
        self.compare_rollouts()
        self.compare_workers()
        if self.model.rollouts:
            self.compare_attempts(self.some_rollout(self.turn))

    def compare_rollouts(self) -> None:
        """Status and latest attempt of every rollout, in order of creation."""
        found = self.run(self.store.query_rollouts())
        assert [(r.rollout_id, r.status) for r in found] == [
            (r.rollout_id, r.status) for r in self.model.rollouts.values()
        ]
        assert all((rollout.end_time is not None) == (rollout.status in FINAL) for rollout in found)

    def compare_workers(self) -> None:
        """Status of every worker, and that it claims to hold what it holds."""
        for worker in self.run(self.store.query_workers()):
            held = {attempt.attempt_id for attempt in self.model.held(worker.worker_id)}
            assert worker.status == self.model.worker_status(worker.worker_id), worker
            current = worker.current_attempt_id
            assert current in held if held else current is None, worker

    def compare_attempts(self, rollout: ModelRollout) -> None:
        """Every attempt of one rollout; the next one's turn is after the next step."""
        found = self.run(self.store.query_attempts(rollout.rollout_id))
        assert [(a.attempt_id, a.status, a.worker_id, a.last_heartbeat_time) for a in found] == [
            (a.attempt_id, a.status, a.worker_id, a.heard) for a in rollout.attempts
        ]
        assert [a.sequence_id for a in found] == list(range(1, len(found) + 1))

    def compare_spans(self) -> None:
        """Every span of every attempt."""
        for rollout in self.model.rollouts.values():
            found = self.run(self.store.query_spans(rollout.rollout_id))
            assert [(span.attempt_id, span.span_id, span.sequence_id) for span in found] == [
                (attempt.attempt_id, span_id, number)
                for attempt in rollout.attempts
                for span_id, number in sorted(attempt.spans.items(), key=lambda item: item[1])
            ]

    # --- Picking ---

    def attempts(self) -> list[tuple[ModelRollout, ModelAttempt]]:
        """All there are."""
        return [
            (rollout, attempt) for rollout in self.model.rollouts.values() for attempt in rollout.attempts
        ]

    def some_rollout(self, index: int) -> ModelRollout:
        """Any of them; small indexes mean the newest, for they do most."""
        return list(self.model.rollouts.values())[-1 - index % len(self.model.rollouts)]

    def some_attempt(self, index: int) -> tuple[ModelRollout, ModelAttempt]:
        """Any of them; small indexes mean the newest."""
        every = self.attempts()
        return every[-1 - index % len(every)]

    def refused(self, call: Coroutine[Any, Any, Any]) -> None:
        """The store must refuse this."""
        try:
            self.run(call)
        except ValueError:
            return
        raise AssertionError("the store accepted what it must refuse")


class ClientMachine(StoreMachine):
    """The same through gRPC: `make_store` makes the store that is served. Mix it in first."""

    async def open_store(self, stack: AsyncExitStack) -> LightningStore:
        from lightning.rpc import LightningStoreClient, LightningStoreServer  # needed by nobody else here

        server = LightningStoreServer(self.make_store(), port=0)
        stack.push_async_callback(server.close)
        await server.start()
        client = LightningStoreClient(server.endpoint)
        stack.push_async_callback(client.close)
        return client
