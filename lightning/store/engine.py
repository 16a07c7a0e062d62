"""The verbs of the contract, written once, over any `Persistence`.

A verb checks its arguments, asks the lifecycle what should happen, has the persistence make it true, and tells
whoever waits. It keeps no state of its own beside the watchdog's next deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.store import lifecycle
from lightning.store.arguments import (
    ATTEMPT_STATUSES,
    MODES,
    ROLLOUT_STATUSES,
    check_choice,
    check_count,
    check_requests,
    check_time,
    check_worker_id,
    config_record,
    require_choice,
    unknown_resources,
)
from lightning.store.core import QUEUE
from lightning.store.idempotency import current_request, id_source, new_ids
from lightning.store.persistence.abc import AttemptTakenError, RolloutChange, WorkerTransition
from lightning.store.queries import check_wait
from lightning.store.reading import as_worker
from lightning.store.recording import RecordingVerbs
from lightning.store.records import (
    ResourcesRecord,
    RolloutRecord,
    WorkerRecord,
    encode_metadata,
    encode_resources,
)
from lightning.store.texts import check_text
from lightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    CancelAttempt,
    EnqueueRolloutRequest,
    HeartbeatReply,
    NamedResources,
    ResourcesChanged,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Unset,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    encode_payload,
)

if TYPE_CHECKING:
    pass

_REMEMBERED_VERSIONS = 8
"""How far back a repeated `update_resources` is recognised."""


class StoreEngine(RecordingVerbs):
    """A store over a backend.

    Args:
        persistence: Where records rest.
        clock: Tells the time; tests pass one that they move by hand.
        validate_resources: Whether an explicit `resources_id` must exist when a rollout is created. False is for code
            that relies on being able to name resources before they are published.
    """

    # --- Handing out work --------------------------------------------------------------------------------------

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        now = await self._enter()
        check_worker_id(worker_id)
        request = EnqueueRolloutRequest.model_construct(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
        )
        (record,) = await self._new_rollouts([request], now)
        record = lifecycle.begin_attempt(record, new_ids("at", 1)[0], worker_id, None, now)
        (record,) = await self._complete(self._insert([record], now))
        return record.to_attempted_rollout(record.attempts[0])

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        request = EnqueueRolloutRequest.model_construct(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
        )
        return (await self.enqueue_many_rollouts([request]))[0]

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        check_requests(rollouts)
        now = await self._enter()
        records = await self._complete(self._insert(await self._new_rollouts(rollouts, now), now))
        return [record.to_rollout() for record in records]

    async def _insert(self, records: Sequence[RolloutRecord], now: float) -> Sequence[RolloutRecord]:
        stored = await self._persistence.insert_rollouts(records, partial(lifecycle.settle, now=now))
        for record in stored:
            self._tell(None, record)
        return stored

    async def dequeue_rollout(self, worker_id: str | None = None) -> AttemptedRollout | None:
        claimed = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id)
        return claimed[0] if claimed else None

    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        check_count(limit, "limit", least=0)
        return await self._claim(limit, worker_id, None)

    async def claim_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        instance_id: str | None = None,
        timeout: float | None = None,
    ) -> Sequence[AttemptedRollout]:
        check_count(limit, "limit", least=1)
        wait = check_wait(timeout)
        until = None if wait is None else self._clock.now() + wait
        with self._broker.subscribe([QUEUE]) as subscription:
            while True:
                claimed = await self._claim(limit, worker_id, instance_id)
                if claimed or wait == 0:
                    return claimed
                if not await subscription.wait(until):
                    wait = 0  # the time is up: one last look

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        now = await self._enter()
        check_worker_id(worker_id)
        (attempt_id,) = new_ids("at", 1)
        change = await self._change(
            rollout_id, lambda record: lifecycle.begin_attempt(record, attempt_id, worker_id, None, now), now
        )
        attempt = change.after.find_attempt(attempt_id)
        assert attempt is not None
        return change.after.to_attempted_rollout(attempt)

    async def _claim(
        self, limit: int, worker_id: str | None, instance_id: str | None
    ) -> Sequence[AttemptedRollout]:
        now = await self._enter()
        check_worker_id(worker_id)
        attempt_id = id_source("at")
        shared = self._persistence.shared
        claimed = [] if shared else await self._claimed_before(attempt_id, range(limit))
        if claimed:
            return claimed

        def begin(record: RolloutRecord, taken: int) -> RolloutRecord:
            return lifecycle.begin_attempt(
                record, attempt_id(len(claimed) + taken), worker_id, instance_id, now
            )

        def dequeued(worker: WorkerRecord) -> WorkerRecord:
            return worker._replace(last_dequeue_time=now)

        def settle(
            before: RolloutRecord | None, after: RolloutRecord
        ) -> Iterable[tuple[str, WorkerTransition]]:
            settled = lifecycle.settle(before, after, now)
            return settled if worker_id is None else [(worker_id, dequeued), *settled]

        async def claim_and_tell() -> list[RolloutChange]:
            changes = await self._persistence.claim_rollouts(limit - len(claimed), begin, settle)
            if worker_id is not None and not changes:
                await self._persistence.change_worker(worker_id, dequeued)
            for change in changes:
                self._tell(change.before, change.after)
            return changes

        while True:
            try:
                changes = await self._complete(claim_and_tell())
            except AttemptTakenError:
                changes = []
            claimed += [change.after.to_attempted_rollout(change.after.attempts[-1]) for change in changes]
            if not shared or len(claimed) == limit:
                return claimed
            # another server may have had this request first, and its answer got lost; or it has it now
            by_others = await self._claimed_before(attempt_id, range(len(claimed), limit))
            if not by_others:
                return claimed
            claimed += by_others

    async def _claimed_before(
        self, attempt_id_of: Callable[[int], str], numbers: Iterable[int]
    ) -> list[AttemptedRollout]:
        """What this request claimed already, if it is a repeat: the attempts it begins have ids of its own."""
        claimed: list[AttemptedRollout] = []
        if current_request() is None:
            return claimed
        for attempt_id in map(attempt_id_of, numbers):
            record = await self._persistence.get_rollout_of_attempt(attempt_id)
            attempt = None if record is None else record.find_attempt(attempt_id)
            if record is None or attempt is None:
                break  # they are used in order
            claimed.append(record.to_attempted_rollout(attempt))
        return claimed

    async def _new_rollouts(
        self, requests: Sequence[EnqueueRolloutRequest], now: float
    ) -> list[RolloutRecord]:
        """Check the requests; the records to insert, in `queuing`."""
        bound: dict[str | None, str | None] = {}
        records = []
        for request, rollout_id in zip(requests, new_ids("ro", len(requests)), strict=True):
            resources_id = request.resources_id
            if resources_id not in bound:
                bound[resources_id] = await self._bind_resources(resources_id)
            records.append(
                RolloutRecord(
                    rollout_id=rollout_id,
                    input=encode_payload(request.input, "input"),
                    status="queuing",
                    start_time=now,
                    config=config_record(request.config),
                    mode=check_choice(request.mode, MODES, "mode"),
                    resources_id=bound[resources_id],
                    metadata=encode_metadata(request.metadata),
                )
            )
        return records

    async def _bind_resources(self, resources_id: str | None) -> str | None:
        if resources_id is None:
            latest = await self._persistence.get_latest_resources()
            return None if latest is None else latest.resources_id
        await self._check_resources_exist(resources_id)
        return resources_id

    async def _check_resources_exist(self, resources_id: str) -> None:
        check_text(resources_id, "resources_id")
        if self._validate_resources and await self._persistence.get_resources(resources_id, None) is None:
            raise unknown_resources(resources_id)

    # --- Resources ---------------------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        now = await self._enter()
        (resources_id,) = new_ids("rs", 1)
        record = ResourcesRecord(resources_id, 1, now, now, encode_resources(resources))
        if await self._persistence.insert_resources(record):
            return self._published(record)
        stored = await self._persistence.get_resources(resources_id, 1)  # the repeat of a request
        assert stored is not None
        return stored.to_update()

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        now = await self._enter()
        check_text(resources_id, "resources_id")
        encoded = encode_resources(resources)
        digest = current_request()
        while True:
            newest = await self._persistence.get_resources(resources_id, None)
            if newest is None:
                raise unknown_resources(resources_id)
            repeated = await self._published_before(newest, digest)
            if repeated is not None:
                return repeated.to_update()
            record = ResourcesRecord(
                resources_id, newest.version + 1, newest.create_time, now, encoded, digest
            )
            if await self._persistence.insert_resources(record):
                return self._published(record)

    async def _published_before(self, newest: ResourcesRecord, digest: str | None) -> ResourcesRecord | None:
        """The version that this request published already, if it is a repeat."""
        record: ResourcesRecord | None = newest
        for version in range(newest.version - 1, newest.version - _REMEMBERED_VERSIONS, -1):
            if digest is None or record is None or record.request_digest == digest:
                break
            record = await self._persistence.get_resources(newest.resources_id, version)
        return (
            record if digest is not None and record is not None and record.request_digest == digest else None
        )

    def _published(self, record: ResourcesRecord) -> ResourcesUpdate:
        self._commands.send(ResourcesChanged(resources_id=record.resources_id, version=record.version), None)
        return record.to_update()

    # --- Changing records --------------------------------------------------------------------------------------

    async def update_rollout(
        self,
        rollout_id: str,
        input: Any | Unset = UNSET,
        mode: RolloutMode | None | Unset = UNSET,
        resources_id: str | None | Unset = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Rollout:
        now = await self._enter()
        changes: dict[str, Any] = {}
        if input is not UNSET:
            changes["input"] = encode_payload(input, "input")
        if mode is not UNSET:
            changes["mode"] = check_choice(mode, MODES, "mode")
        if resources_id is not UNSET:
            if resources_id is not None:
                await self._check_resources_exist(resources_id)
            changes["resources_id"] = resources_id
        if status is not UNSET:
            changes["status"] = require_choice(status, ROLLOUT_STATUSES, "status")
        if config is not UNSET:
            changes["config"] = config_record(config)
        if metadata is not UNSET:
            changes["metadata"] = encode_metadata(metadata)
        change = await self._change(
            rollout_id, lambda record: lifecycle.update_rollout(record, changes, now), now, interrupt=True
        )
        return change.after.to_rollout()

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | None | Unset = UNSET,
        last_heartbeat_time: float | None | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Attempt:
        now = await self._enter()
        check_text(attempt_id, "attempt_id")
        changes: dict[str, Any] = {}
        if status is not UNSET:
            changes["status"] = require_choice(status, ATTEMPT_STATUSES, "status")
        if worker_id is not UNSET:
            changes["worker_id"] = check_worker_id(worker_id)
        if last_heartbeat_time is not UNSET:
            changes["last_heartbeat_time"] = check_time(last_heartbeat_time, "last_heartbeat_time")
        if metadata is not UNSET:
            changes["metadata"] = encode_metadata(metadata)
        change = await self._change(
            rollout_id, lambda record: lifecycle.update_attempt(record, attempt_id, changes, now), now
        )
        # "latest" is resolved on the record before: the change does not add attempts
        attempt = change.after.find_attempt(attempt_id)
        assert attempt is not None
        return attempt.to_attempt(rollout_id)

    async def update_worker(
        self, worker_id: str, heartbeat_stats: dict[str, Any] | None | Unset = UNSET
    ) -> Worker:
        now = await self._enter()
        check_worker_id(worker_id, required=True)
        changes: dict[str, Any] = {"last_heartbeat_time": now}
        if heartbeat_stats is not UNSET:
            changes["heartbeat_stats"] = encode_metadata(heartbeat_stats, "heartbeat_stats")
        record = await self._persistence.change_worker(worker_id, lambda worker: worker._replace(**changes))
        for lease in record.leases:
            if lease.instance_id is None:
                await self._refresh(lease.rollout_id, lease.attempt_id, now)
        return as_worker(record, now)

    async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
        now = await self._enter()
        worker_id = heartbeat.worker_id
        check_worker_id(worker_id, required=True)
        changes: dict[str, Any] = {
            "last_heartbeat_time": now,
            "silent_after_seconds": heartbeat.silent_after_seconds,
        }
        if heartbeat.heartbeat_stats is not None:
            changes["heartbeat_stats"] = encode_metadata(heartbeat.heartbeat_stats, "heartbeat_stats")
        record = await self._persistence.change_worker(worker_id, lambda worker: worker._replace(**changes))
        commands: list[WorkerCommand] = []
        for ref in heartbeat.attempts:
            rollout = await self._persistence.get_rollout(ref.rollout_id)
            if lifecycle.holds_attempt(rollout, ref.attempt_id, worker_id, heartbeat.instance_id):
                await self._refresh(ref.rollout_id, ref.attempt_id, now)
                continue
            attempt = None if rollout is None else rollout.find_attempt(ref.attempt_id)
            closed = attempt is not None and not lifecycle.is_open(attempt)
            status: AttemptStatus = attempt.status if attempt is not None and closed else "cancelled"
            commands.append(
                CancelAttempt(rollout_id=ref.rollout_id, attempt_id=ref.attempt_id, status=status)
            )
        return HeartbeatReply(worker=as_worker(record, now), commands=commands)

    async def _refresh(self, rollout_id: str, attempt_id: str, now: float) -> None:
        await self._persistence.change_rollout(
            rollout_id, lambda record: lifecycle.refresh_attempt(record, attempt_id, now)
        )
