"""What a backend must be able to do: a few primitives, and no rule.

A backend stores records and finds them again. What a record may become is decided by the pure functions of
`lightning.store.lifecycle`, which the engine hands in; a backend calls such a transition with the current record and
makes the result true, atomically. It may call it more than once (an optimistic backend does, after a conflict), and it
must pass on what the transition raises, having changed nothing.

Three facts about a record are derived, never decided, by a backend, so that its indexes agree with the record:
`lifecycle.is_queued` (the queue holds exactly those, in the order in which they entered it), `lifecycle.next_deadline`
and `lifecycle.is_finished`.

The records of workers tell which attempts they hold, and so follow the rollouts'. What becomes of them is decided by
the `settle` that comes with a change; a backend makes it true in the same step if it can, and otherwise before it
returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lightning.store.lifecycle import Effects
from lightning.store.queries import RolloutQuery
from lightning.store.records import ResourcesRecord, RolloutRecord, SpanReceipt, SpanRecord, WorkerRecord
from lightning.types import WorkerCommand

RolloutTransition = Callable[[RolloutRecord], RolloutRecord]
ClaimTransition = Callable[[RolloutRecord, int], RolloutRecord]
"""As `RolloutTransition`, told also how many rollouts this claim took before."""
WorkerTransition = Callable[[WorkerRecord], WorkerRecord]
Settlement = Callable[[RolloutRecord | None, RolloutRecord], Iterable[tuple[str, WorkerTransition]]]
"""From a rollout before (None: it is new) and after a change to what that makes of which workers: the same if it is
made once more."""
SpanTransition = Callable[[RolloutRecord, Sequence[SpanRecord]], tuple[RolloutRecord, list[int]]]
"""From the record and the spans that are new to the attempt, to the next record and the spans' sequence ids."""


@dataclass(frozen=True)
class RolloutChange:
    """One rollout, before and after."""

    before: RolloutRecord
    after: RolloutRecord


@dataclass(frozen=True)
class Totals:
    """How much there is."""

    rollouts_by_status: dict[str, int]
    attempts: int
    spans: int
    resources: int
    workers: int
    span_bytes: int
    evicted_spans: int = 0
    dropped_rollouts: int = 0
    attempts_by_status: dict[str, int] | None = None
    """None: not known without counting through them."""
    queued_since: float | None = None
    """`lifecycle.queued_since` of the rollout at the head of the queue; None if there is none."""
    limits: dict[str, int] = field(default_factory=dict)
    """Sizes that this backend keeps to, in bytes, by the names that `LightningStoreStatistics` has for them."""


@dataclass(frozen=True)
class RolloutNotice:
    """Another server changed a rollout."""

    rollout_id: str
    effects: Effects
    """As far as they matter to who waits; `released` may name attempts that had been released before."""


@dataclass(frozen=True)
class ResourcesNotice:
    """Another server published resources."""

    resources_id: str
    version: int


@dataclass(frozen=True)
class CommandNotice:
    """Another server sends a command to workers."""

    command: WorkerCommand
    worker_id: str | None
    """To which of them; None: to all."""


@dataclass(frozen=True)
class LookAgain:
    """Changes that other servers made may have gone unnoticed."""


@dataclass(frozen=True)
class UntoldNotice:
    """Other servers may have changed rollouts in ways of which no `RolloutNotice` tells: who watches some has to look
    at them."""


Notice = RolloutNotice | ResourcesNotice | CommandNotice | LookAgain | UntoldNotice
Announce = Callable[[Notice], int]
"""Passes a notice on to whom it concerns; returns how many worker processes get a command by it."""


class SpansEvictedError(RuntimeError):
    """Spans that were asked for had been dropped to keep memory within its limit."""


class AttemptTakenError(Exception):
    """An attempt that was to begin has the id of one that has begun: another server serves the same request."""


class BackendError(RuntimeError):
    """The backend could not do its work, through no fault of the caller's. Nothing was changed.

    ```
    BackendError
    ├── BackendOpenError          the backend cannot be opened: the message says what is in the way
    ├── BackendFullError          there is no room left; works again when there is
    └── BackendUnavailableError   the backend stays away; also a ConnectionError. Alone of these, it may leave a
                                  change made
    ```
    """


class BackendOpenError(BackendError):
    """The place where records rest cannot be opened, or must not be."""


class BackendFullError(BackendError):
    """There is no room left where records rest."""


class BackendUnavailableError(BackendError, ConnectionError):
    """The place where records rest could not be reached, retries included. Whether the last call changed something is
    unknown, unless the message says so."""


class Persistence(ABC):
    """A backend. Every method is atomic and, once it has returned, as durable as the backend is."""

    name: str
    """For people: `memory`, `sqlite`, …"""
    durable: bool
    """Whether what was written survives the process."""
    instant: bool = False
    """Whether its methods never suspend, so that a caller cannot go away in the middle."""
    shared: bool = False
    """Whether other servers may work on the same records; then the engine calls `watch`, and `claim_rollouts` refuses
    ids of attempts that are taken: no look at what is there before it would be sure to last."""

    async def open(self) -> None:
        """Make ready; called once, before anything else."""
        return

    async def close(self) -> None:
        """Release files, threads and connections; called once, last."""
        return

    async def watch(self, announce: Announce, is_awaited: Callable[[], bool]) -> None:
        """Tell of changes that other servers make to the records, until cancelled; begin with `LookAgain`, once any
        change from then on will be noticed. Called only if `shared`, and again when it fails.

        Args:
            announce: To be told.
            is_awaited: Whether anybody waits for anything, for backends that can only look from time to time.
        """
        return

    async def send_command(self, command: WorkerCommand, worker_id: str | None) -> int:
        """Have other servers bring a command to workers that listen there; returns how many worker processes get it.
        Called only if `shared`."""
        return 0

    # --- rollouts ---

    @abstractmethod
    async def insert_rollouts(
        self, records: Sequence[RolloutRecord], settle: Settlement | None = None
    ) -> list[RolloutRecord]:
        """Store new rollouts, all or none; the queued ones enter the queue in this order. One whose id is taken is
        the repeat of a request and is left as it is stored. Returns all of them as they are stored."""

    @abstractmethod
    async def get_rollout(self, rollout_id: str) -> RolloutRecord | None:
        """One rollout, or None."""

    @abstractmethod
    async def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, RolloutRecord]:
        """Those of these rollouts that exist, by id."""

    async def why_gone(self, rollout_id: str) -> str | None:
        """Why a rollout that once was there no longer is, for people; None if it is not remembered to have been."""
        return None

    @abstractmethod
    async def get_rollout_of_attempt(self, attempt_id: str) -> RolloutRecord | None:
        """The rollout that has this attempt, or None."""

    @abstractmethod
    async def change_rollout(
        self, rollout_id: str, transition: RolloutTransition, settle: Settlement | None = None
    ) -> RolloutChange | None:
        """Replace a rollout by what `transition` makes of it; None if there is none. A transition that returns the
        record it was given changes nothing, its revision included."""

    @abstractmethod
    async def settled_revision(self) -> int:
        """A revision up to which all changes are over: each of them is seen by whoever reads from now on, and none will
        be added. It rises while changes are made, to the highest there is or to a little below."""

    @abstractmethod
    async def claim_rollouts(
        self, limit: int, transition: ClaimTransition, settle: Settlement | None = None
    ) -> list[RolloutChange]:
        """Take up to `limit` rollouts off the head of the queue, applying `transition` to each.

        Raises:
            AttemptTakenError: It has taken none, for the attempt that `transition` began has begun elsewhere. Only a
                backend that is `shared` finds that out.
        """

    @abstractmethod
    async def find_rollouts(self, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
        """The page of the query, and how many match in all. Without a sort field: in order of creation."""

    @abstractmethod
    async def queue_order(self) -> list[str]:
        """The ids of the rollouts in the queue, from its head."""

    @abstractmethod
    async def due_rollouts(self, now: float, limit: int) -> list[str]:
        """Up to `limit` rollouts whose deadline is before `now`, the earliest first."""

    @abstractmethod
    async def first_deadline(self) -> float | None:
        """A time before which no rollout is due; None if none ever will be as things stand."""

    # --- spans ---

    @abstractmethod
    async def append_spans(
        self,
        rollout_id: str,
        attempt_id: str,
        spans: Sequence[SpanRecord],
        transition: SpanTransition,
        settle: Settlement | None = None,
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        """Store those of the attempt's spans whose span id it does not have yet, and change the rollout with them.
        Returns a receipt per span, in order; None if the rollout does not exist."""

    @abstractmethod
    async def find_spans(self, rollout_id: str, attempt_ids: Sequence[str]) -> list[SpanRecord]:
        """All spans of these attempts, attempt by attempt, each in order of sequence id, then of arrival.

        Raises:
            SpansEvictedError: They are no longer all there.
        """

    # --- resources ---

    @abstractmethod
    async def insert_resources(self, record: ResourcesRecord) -> bool:
        """Store a version of resources and make it the latest; False if that version of that id exists already."""

    @abstractmethod
    async def get_resources(self, resources_id: str, version: int | None) -> ResourcesRecord | None:
        """One version, None the newest of this id."""

    @abstractmethod
    async def get_latest_resources(self) -> ResourcesRecord | None:
        """The version that was stored last, of whatever id."""

    @abstractmethod
    async def find_resources(self) -> list[ResourcesRecord]:
        """All versions of all ids, in the order in which they were stored."""

    # --- workers ---

    @abstractmethod
    async def change_worker(self, worker_id: str, transition: WorkerTransition) -> WorkerRecord:
        """Replace a worker by what `transition` makes of it; of an empty record if there is none."""

    @abstractmethod
    async def get_worker(self, worker_id: str) -> WorkerRecord | None:
        """One worker, or None."""

    @abstractmethod
    async def find_workers(self) -> list[WorkerRecord]:
        """All workers, in order of creation."""

    # --- about itself ---

    @abstractmethod
    async def totals(self) -> Totals:
        """How much there is, without counting through it."""

    async def check_writable(self) -> None:
        """Raises what a write would raise now; changes no record. A backend that can tell only by writing writes."""
        await self.totals()
