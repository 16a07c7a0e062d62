"""What all verbs of the engine share: entering one, changing a record, and telling whoever it concerns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from lightning.store import lifecycle
from lightning.store.arguments import (
    unknown_rollout,
)
from lightning.store.broker import BrokerClosed, EventBroker
from lightning.store.clock import Clock, SystemClock
from lightning.store.contract import LightningStore, UnknownIdError
from lightning.store.idempotency import applied_value, current_request, mark_applied
from lightning.store.mailbox import WorkerMailboxes
from lightning.store.outside import OutsideWorld
from lightning.store.persistence.abc import (
    CommandNotice,
    Notice,
    Persistence,
    ResourcesNotice,
    RolloutChange,
    RolloutNotice,
    UntoldNotice,
)
from lightning.store.records import (
    RolloutRecord,
)
from lightning.store.texts import check_text
from lightning.store.watchdog import Watchdog
from lightning.types import (
    CancelAttempt,
    LightningStoreCapabilities,
    ResourcesChanged,
    WorkerCommand,
)

T = TypeVar("T")

QUEUE = "queue"
"""The topic of rollouts that entered the queue. That of one that finished is `("finished", rollout_id)`, that of one in
which something is to be seen `("changed", rollout_id)`."""
ANY_CHANGE = "changed"
"""The topic of changes that somebody made who does not say to which rollouts."""

_EXPIRE_BATCH = 256


class EngineCore(LightningStore):
    """A store over a backend.

    Args:
        persistence: Where records rest.
        clock: Tells the time; tests pass one that they move by hand.
        validate_resources: Whether an explicit `resources_id` must exist when a rollout is created. False is for code
            that relies on being able to name resources before they are published.
    """

    def __init__(
        self, persistence: Persistence, *, clock: Clock | None = None, validate_resources: bool = True
    ) -> None:
        self._persistence = persistence
        self._clock = clock or SystemClock()
        self._broker = EventBroker(self._clock)
        self._commands = WorkerMailboxes(self._broker)
        self._watchdog = Watchdog(self._broker, lambda: self._complete(self._expire()))
        self._outside = OutsideWorld(persistence, self._broker, self._watchdog, self._hear)
        self._validate_resources = validate_resources
        self._opened_at = time.monotonic()
        self._opened = False
        self._opening: Future[None] | None = None
        self._opening_lock = threading.Lock()
        self._expired_attempts: Counter[str] = Counter()
        """How many attempts were closed because their time was up, by what they became."""
        self._steps: set[asyncio.Future[Any]] = set()
        """What is being finished, kept from the garbage collector."""

    @property
    def persistence(self) -> Persistence:
        """Where records rest, for who moves them while the store is not in use."""
        return self._persistence

    @property
    def instant(self) -> bool:
        """Whether a verb that changes something never suspends between its first change and its end, so that a caller
        cannot go away in the middle."""
        return self._persistence.instant

    @property
    def _mailboxes(self) -> WorkerMailboxes:
        return self._commands

    async def send_command(self, command: WorkerCommand, worker_id: str | None = None) -> int:
        here = self._commands.send(command, worker_id)
        if not self._persistence.shared:
            return here
        await self._enter()
        return here + await self._persistence.send_command(command, worker_id)

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return LightningStoreCapabilities(
            thread_safe=True, async_safe=True, zero_copy=False, otlp_traces=False
        )

    async def close(self) -> None:
        if self._broker.closed:
            return
        self._broker.close()
        await self._watchdog.close()
        here = [step for step in self._steps if step.get_loop() is asyncio.get_running_loop()]
        await asyncio.gather(*here, return_exceptions=True)
        await self._outside.close()
        if self._opened:
            await self._persistence.close()

    async def _enter(self) -> float:
        """Begin a verb: the store must be open, and what is overdue must have happened. Returns the time."""
        if self._broker.closed:
            raise BrokerClosed("the store was closed")
        while not self._opened:
            await self._open()
        self._outside.attend()
        self._watchdog.attend()
        await self._watchdog.catch_up()
        return self._clock.now()

    async def _open(self) -> None:
        """Have the backend opened, once, however many callers come first."""
        with self._opening_lock:
            opening, self._opening = self._opening, self._opening or Future()
        if opening is None:
            await self._complete(self._open_now())
        else:
            await asyncio.shield(asyncio.wrap_future(opening))

    async def _open_now(self) -> None:
        try:
            await self._persistence.open()
            self._watchdog.watch(await self._persistence.first_deadline())
            self._opened = True
        finally:
            with self._opening_lock:  # if it failed, the next caller tries, and learns why it cannot be
                opening, self._opening = self._opening, None
            if opening is not None:
                opening.set_result(None)

    async def _expire(self) -> float | None:
        """Close every attempt whose time is up; returns the next deadline."""
        while True:
            now = self._clock.now()
            due = await self._persistence.due_rollouts(now, _EXPIRE_BATCH)
            for rollout_id in due:
                change = await self._persistence.change_rollout(
                    rollout_id,
                    lambda record, now=now: lifecycle.expire(record, now),  # type: ignore[misc]
                    partial(lifecycle.settle, now=now),
                )
                if change is not None:
                    self._expired_attempts.update(lifecycle.closed_attempts(change.before, change.after))
                    self._tell(change.before, change.after, interrupt=True)
            if len(due) < _EXPIRE_BATCH:
                return await self._persistence.first_deadline()

    async def _require_rollout(self, rollout_id: str) -> RolloutRecord:
        check_text(rollout_id, "rollout_id")
        record = await self._persistence.get_rollout(rollout_id)
        if record is None:
            raise await self._unknown(rollout_id)
        return record

    async def _unknown(self, rollout_id: str) -> UnknownIdError:
        return unknown_rollout(rollout_id, await self._persistence.why_gone(rollout_id))

    async def _change(
        self,
        rollout_id: str,
        transition: Callable[[RolloutRecord], RolloutRecord],
        now: float,
        *,
        interrupt: bool = False,
    ) -> RolloutChange:
        check_text(rollout_id, "rollout_id")
        digest = current_request()

        def once(record: RolloutRecord) -> RolloutRecord:
            if applied_value(record, digest) is not None:
                return record  # the caller lost the reply and asks again
            return mark_applied(transition(record), digest)

        async def change_and_tell() -> RolloutChange:
            change = await self._persistence.change_rollout(
                rollout_id, once, partial(lifecycle.settle, now=now)
            )
            if change is None:
                raise await self._unknown(rollout_id)
            self._tell(change.before, change.after, interrupt=interrupt)
            return change

        return await self._complete(change_and_tell())

    async def _complete(self, step: Coroutine[Any, Any, T]) -> T:
        """Take a step to its end even if the caller goes away: a change that nobody is told of is waited for for ever.

        The caller is let go at once; what its verb had begun is finished without it.
        """
        if self._persistence.instant:
            return await step
        task = asyncio.ensure_future(step)
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return await asyncio.shield(task)

    def _tell(self, before: RolloutRecord | None, after: RolloutRecord, *, interrupt: bool = False) -> None:
        """Let everybody know what a change means to them.

        Args:
            before: The rollout's record before the change; None if it is new.
            after: The record since.
            interrupt: Whether a worker that lost an attempt by this change does not know it yet.
        """
        effects = lifecycle.effects(before, after)
        if interrupt:
            for hold in effects.released:
                self._interrupt(hold)
        self._watchdog.watch(lifecycle.next_deadline(after))
        self._publish(after.rollout_id, effects)

    def _hear(self, notice: Notice) -> int:
        """Let those who wait on this server know what another one did; returns how many worker processes get a command
        by it."""
        if isinstance(notice, CommandNotice):
            return self._commands.send(notice.command, notice.worker_id)
        if isinstance(notice, ResourcesNotice):
            return self._commands.send(
                ResourcesChanged(resources_id=notice.resources_id, version=notice.version), None
            )
        if isinstance(notice, RolloutNotice):
            interrupted = sum(map(self._interrupt, notice.effects.released))
            self._publish(notice.rollout_id, notice.effects)
            return interrupted
        if isinstance(notice, UntoldNotice):
            self._broker.publish(ANY_CHANGE)
        else:
            self._broker.publish_all()
        return 0

    def _publish(self, rollout_id: str, effects: lifecycle.Effects) -> None:
        if effects.entered_queue:
            self._broker.publish(QUEUE, at_most=1)
        if effects.finished:
            self._broker.publish(("finished", rollout_id))
        if effects.changed:
            self._broker.publish(("changed", rollout_id))

    def _interrupt(self, hold: lifecycle.Hold) -> int:
        if hold.status == "unresponsive":  # that one may yet be revived
            return 0
        ref = {"rollout_id": hold.lease.rollout_id, "attempt_id": hold.lease.attempt_id}
        return self._commands.send(CancelAttempt(**ref, status=hold.status), hold.worker_id)
