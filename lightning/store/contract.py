"""The LightningStore contract: every verb, what it promises, and which errors it raises.

Reads like a table of contents of the product. Whoever implements a store implements the abstract methods; whoever
uses one, locally or over gRPC, calls these and nothing else.

Rules that hold for every verb:

- It is a coroutine, and atomic: callers never see half of it. (`watch_rollouts` alone goes on and on.)
- An identifier or a filter that is no string raises `TypeError`; one that is no valid Unicode, `ValueError`.
- An unknown identifier raises `ValueError` naming it (`UnknownIdError`, where it is a store of ours), unless the verb
  is a `get_…` that returns `None`.
- Payloads (`input`, `metadata`, `heartbeat_stats`) are JSON values, see `lightning.types.payload`; what cannot be
  stored is refused with `TypeError` or `ValueError` before anything changes.
- Records that go in and come out are copies.
- Times are seconds since the epoch; time spans are seconds.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from lightning.store.mailbox import WorkerMailboxes
from lightning.store.numbers import check_count, check_revision, check_wait
from lightning.store.polling import RevisionGoneError, poll_rollouts
from lightning.store.texts import check_ids, check_worker_id
from lightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptRef,
    AttemptStatus,
    CancelAttempt,
    EnqueueRolloutRequest,
    HeartbeatReply,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutEvent,
    RolloutMode,
    RolloutStatus,
    Span,
    Unset,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    WorkerStatus,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

FilterLogic = Literal["and", "or"]
SortOrder = Literal["asc", "desc"]

TERMINAL_ROLLOUT_STATUSES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
TERMINAL_ATTEMPT_STATUSES: frozenset[str] = frozenset(
    {"succeeded", "failed", "timeout", "unresponsive", "cancelled"}
)

_CLAIM_POLL_SECONDS = 0.05
"""How often the default `claim_rollouts` looks, for stores that cannot tell when work arrives."""


class UnknownIdError(ValueError):
    """An identifier that the store does not know. The message names it."""


class LightningStore(ABC):
    """The control plane between algorithms and runners.

    The abstract methods are the whole obligation of an implementation. The verbs under "For runners", `watch_rollouts`
    and `check_writable` have defaults built on them, so that any store can serve runners; a store that knows when
    things happen overrides them to do better than poll.
    """

    # --- About the store ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def capabilities(self) -> LightningStoreCapabilities:
        """What this store can do."""

    @abstractmethod
    async def statistics(self) -> LightningStoreStatistics:
        """Counts and sizes, cheap enough to ask every second."""

    async def check_writable(self) -> None:
        """Return if changes can be stored now; otherwise raise what a change would raise. Changes nothing that can be
        seen. For health checks: cheap enough to be asked every second."""
        await self.statistics()

    async def close(self) -> None:
        """Release what the store holds. Waiting callers are released with an error; closing twice is fine."""
        return

    # --- Handing out work --------------------------------------------------------------------------------------

    @abstractmethod
    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        """Create a rollout in `preparing` with attempt 1, outside the queue: the caller executes it.

        Arguments as in `enqueue_rollout`; `worker_id` names who executes it.
        """

    @abstractmethod
    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        """Create a rollout in `queuing` at the tail of the queue.

        Args:
            input: What the agent is given: any JSON value.
            mode: What it is for.
            resources_id: The resources to run against; None binds the latest ones there are now.
            config: Time limits and retries; None: no limits, one attempt.
            metadata: A JSON object stored with the rollout.

        Raises:
            ValueError: `resources_id` is unknown, or a payload holds a value that JSON cannot.
            TypeError: A payload holds something that is no JSON value.
        """

    @abstractmethod
    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        """`enqueue_rollout` for each element, in order, all or none."""

    @abstractmethod
    async def dequeue_rollout(self, worker_id: str | None = None) -> AttemptedRollout | None:
        """Claim the oldest queued rollout, or return None; never blocks, never hands one rollout to two callers.

        The rollout turns `preparing` and gets its next attempt.
        """

    @abstractmethod
    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        """Claim up to `limit` of the oldest queued rollouts, oldest first. Raises `ValueError` if `limit` < 0."""

    @abstractmethod
    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        """Create the rollout's next attempt by hand. It leaves the queue if it was in it.

        Raises:
            ValueError: The rollout is unknown or cancelled.
        """

    # --- Recording what happened -------------------------------------------------------------------------------

    @abstractmethod
    async def add_span(self, span: Span) -> Span | None:
        """Store a span; None if the attempt already has one with its `span_id`.

        Acts as a heartbeat of the attempt; the first span turns `preparing` into `running`. A `sequence_id` of 0 is
        replaced by the next one.

        Raises:
            ValueError: The rollout or the attempt is unknown, or the span cannot be stored as it is.
            TypeError: An attribute is of a type that OpenTelemetry does not have.
        """

    @abstractmethod
    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        """`add_span` for each; returns those that were stored. All spans are checked before any is stored."""

    @abstractmethod
    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        """Convert a span of the OpenTelemetry SDK and `add_span` it; `sequence_id=None` takes the next one."""

    @abstractmethod
    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """Allocate the attempt's next sequence id: 1, 2, 3, …, never the same twice.

        Raises:
            ValueError: The rollout or the attempt is unknown, or a span was given the last one there is, 2**63 - 1.
        """

    @abstractmethod
    async def get_many_span_sequence_ids(
        self, rollout_attempt_ids: Sequence[tuple[str, str]]
    ) -> Sequence[int]:
        """`get_next_span_sequence_id` for each `(rollout_id, attempt_id)`, in order."""

    # --- Looking things up -------------------------------------------------------------------------------------
    # Filters given together must all hold (`filter_logic="and"`) or any one of them ("or"); an empty `…_in` list
    # matches nothing. `sort_by` names a field of the record, None is the order of creation; a missing value sorts
    # first. `limit=-1` is no limit, `limit=0` returns no items but the total. Bad values raise `ValueError`.

    @abstractmethod
    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        """Find rollouts. `status` and `rollout_ids` are older names of `status_in` and `rollout_id_in`."""

    @abstractmethod
    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """All attempts of a rollout. Raises `ValueError` if it is unknown."""

    @abstractmethod
    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
    ) -> PaginatedResult[Span]:
        """Spans of a rollout, attempt by attempt, each in order of `sequence_id` (then of start and end time).

        `attempt_id` restricts them to one attempt; `"latest"` is the rollout's newest, and matches nothing while
        there is none. `filter_logic` joins the filters on trace, span, parent and name.

        Raises:
            ValueError: The rollout or the attempt is unknown.
            RuntimeError: The spans were evicted to save memory.
        """

    @abstractmethod
    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        """Find versions of resources, every version of every id, in order of publication."""

    @abstractmethod
    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        """Find workers."""

    @abstractmethod
    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """The rollout (an `AttemptedRollout` if it has attempts), or None."""

    @abstractmethod
    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The rollout's newest attempt, or None if it has none. Raises `ValueError` if the rollout is unknown."""

    @abstractmethod
    async def get_resources_by_id(
        self, resources_id: str, version: int | None = None
    ) -> ResourcesUpdate | None:
        """One version of the resources, `version=None` the newest; None if there is no such id or version. Raises
        `ValueError` for what can be no version."""

    @abstractmethod
    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """The version published last, under whatever id; None before the first."""

    @abstractmethod
    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """The worker, or None."""

    @abstractmethod
    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None
    ) -> list[Rollout]:
        """Wait until all of these rollouts are terminal, or until `timeout` seconds have passed (None: no limit).

        Returns:
            Those that are terminal by then, in the order of `rollout_ids`.

        Raises:
            ValueError: An id is unknown, or `timeout` is negative or NaN.
        """

    async def watch_rollouts(
        self, *, rollout_ids: Sequence[str], after_revision: int | None = None
    ) -> AsyncGenerator[RolloutEvent, None]:
        """Follow rollouts: how each is now, then each change of one, until all have ended.

        Nothing is stored up for a watcher: who takes events slowly gets the latest state, several changes as one. A
        heartbeat is no change. Leave the loop early by `contextlib.aclosing`.

        Args:
            rollout_ids: The rollouts.
            after_revision: Go on from here: the `progress_revision` of the last event of an earlier watch. What changed
                since comes first; a state may come again, and a rollout that ended and was dropped since is passed
                over. None: begin with how things are.

        Raises:
            ValueError: An id is unknown, or `after_revision` is no revision.
            RevisionGoneError: The watch cannot go on from there. Watch without `after_revision`.
        """
        check_revision(after_revision)
        wanted = list(dict.fromkeys(check_ids(rollout_ids, "rollout_ids")))
        if after_revision is not None:
            raise RevisionGoneError(
                f"a watch cannot go on from revision {after_revision}: {type(self).__name__} keeps no revisions; watch "
                "without after_revision"
            )
        async with aclosing(poll_rollouts(self, wanted)) as events:
            async for event in events:
                yield event

    # --- Resources ---------------------------------------------------------------------------------------------

    @abstractmethod
    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under a fresh id, as version 1, and make them the latest."""

    @abstractmethod
    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        """Publish the next version under an existing id and make it the latest; earlier versions stay readable.

        Raises:
            ValueError: `resources_id` is unknown.
        """

    # --- Changing records --------------------------------------------------------------------------------------
    # `UNSET` leaves a field as it is, `None` clears it.

    @abstractmethod
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
        """Change a rollout.

        A status of `queuing` or `requeuing` puts it at the tail of the queue unless it is in it; any other takes it
        out. A terminal one closes the open latest attempt likewise (its worker is told to stop) and wakes waiters.
        `cancelled` wins over everything: once cancelled, always cancelled.

        Raises:
            ValueError: The rollout or `resources_id` is unknown, or it is cancelled and `status` says otherwise.
        """

    @abstractmethod
    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | None | Unset = UNSET,
        last_heartbeat_time: float | None | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Attempt:
        """Change an attempt (`attempt_id="latest"`: the newest), for example report its result.

        The rollout follows if it is the latest attempt. A status for an attempt that is closed already changes
        nothing; `unresponsive` is not closed for good: a late result still counts while no newer attempt exists, and
        is noted in the attempt alone when one does.

        Raises:
            ValueError: The rollout or the attempt is unknown, or `status` is `cancelled` (cancel the rollout).
        """

    @abstractmethod
    async def update_worker(
        self, worker_id: str, heartbeat_stats: dict[str, Any] | None | Unset = UNSET
    ) -> Worker:
        """Record a heartbeat; creates the worker if needed. Refreshes the open attempts that this worker holds,
        except those that an instance of it (see `send_heartbeat`) claimed under its own name."""

    # --- For runners -------------------------------------------------------------------------------------------

    async def deliver_spans(self, spans: Sequence[Span]) -> int:
        """`add_many_spans` for who does not want the spans back, which is faster: through a client they share a stream
        with those of other callers.

        What is large may be stored in parts: if a span is refused, those of another part can have been stored.

        Returns:
            How many were stored, those left out that the store had already.

        Raises:
            ValueError: As `add_many_spans`.
            TypeError: As `add_many_spans`.
        """
        return len(await self.add_many_spans(spans))

    async def claim_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        instance_id: str | None = None,
        timeout: float | None = None,
    ) -> Sequence[AttemptedRollout]:
        """`dequeue_many_rollouts` that waits for work.

        Args:
            limit: Claim at most this many; at least 1.
            worker_id: Who executes them.
            instance_id: The process that does, so that only its own heartbeats keep the attempts alive.
            timeout: Longest wait, in seconds; None waits for ever, 0 not at all.

        Returns:
            At least one rollout, or nothing when the time is up.

        Raises:
            ValueError: `limit` < 1, or `timeout` is negative or NaN.
        """
        check_count(limit, "limit", least=1)
        wait = check_wait(timeout)
        deadline = math.inf if wait is None else time.monotonic() + wait
        while True:
            claimed = await self.dequeue_many_rollouts(limit=limit, worker_id=worker_id)
            rest = deadline - time.monotonic()
            if claimed or rest <= 0:
                return claimed
            await asyncio.sleep(min(_CLAIM_POLL_SECONDS, rest))

    async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
        """Record that a worker process lives and what it executes; refreshes those attempts.

        Returns:
            The worker, and a `CancelAttempt` for each named attempt that is not this process's to execute any more: it
            is closed (one that is only `unresponsive` is not, as long as it is the latest), another's, or unknown.
        """
        stats = UNSET if heartbeat.heartbeat_stats is None else heartbeat.heartbeat_stats
        worker = await self.update_worker(heartbeat.worker_id, stats)
        commands: list[WorkerCommand] = []
        for ref in heartbeat.attempts:
            status = await self._why_to_give_up(ref)
            if status is not None:
                ids = {"rollout_id": ref.rollout_id, "attempt_id": ref.attempt_id}
                commands.append(CancelAttempt(**ids, status=status))
        return HeartbeatReply(worker=worker, commands=commands)

    async def _why_to_give_up(self, ref: AttemptRef) -> AttemptStatus | None:
        if await self.get_rollout_by_id(ref.rollout_id) is None:
            return "cancelled"
        attempts = list(await self.query_attempts(ref.rollout_id))
        named = [attempt for attempt in attempts if attempt.attempt_id == ref.attempt_id]
        if not named:
            return "cancelled"
        status = named[0].status
        may_be_revived = status == "unresponsive" and named[0] is attempts[-1]
        return status if status in TERMINAL_ATTEMPT_STATUSES and not may_be_revived else None

    async def receive_commands(
        self, worker_id: str, *, instance_id: str | None = None, timeout: float | None = None
    ) -> Sequence[WorkerCommand]:
        """Wait for commands to this worker; the fast path beside the heartbeat's reply, which is the sure one.

        Returns:
            The commands that arrived, oldest first; nothing when `timeout` seconds have passed (None: no limit).

        Raises:
            ValueError: `timeout` is negative or NaN, or `worker_id` no name.
        """
        return await self._mailboxes.receive(
            check_worker_id(worker_id, required=True), instance_id, check_wait(timeout)
        )

    async def send_command(self, command: WorkerCommand, worker_id: str | None = None) -> int:
        """Send a command to one worker, or to all that listen (`worker_id=None`).

        Returns:
            How many worker processes will get it.
        """
        return self._mailboxes.send(command, worker_id)

    @property
    def _mailboxes(self) -> WorkerMailboxes:
        """Commands are notifications, not state: they live beside any store, in memory."""
        boxes: WorkerMailboxes | None = self.__dict__.get("_worker_mailboxes")
        if boxes is None:
            boxes = self.__dict__.setdefault("_worker_mailboxes", WorkerMailboxes())
        return boxes
