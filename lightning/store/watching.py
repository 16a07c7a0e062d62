"""What one watcher of rollouts has been told, and what is news to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from lightning.store import lifecycle
from lightning.store.persistence.abc import Persistence
from lightning.store.polling import RevisionGoneError, slices
from lightning.store.records import RolloutRecord
from lightning.types import RolloutEvent

_AT_ONCE = 32
"""How many rollouts are held at a time, however slow the watcher is."""


class RolloutWatch:
    """Tells of each rollout how it is now, when that is something else than what it told last.

    It keeps a number per rollout, and no history: to whoever looks rarely, several changes are one.

    Args:
        persistence: Where the records are.
        unknown: Makes the error for an id that there is no rollout of.
        after_revision: What changed up to this revision has been told before; None: nothing has.
    """

    def __init__(
        self,
        persistence: Persistence,
        unknown: Callable[[str], Awaitable[Exception]],
        after_revision: int | None,
    ) -> None:
        self.pending: set[str] = set()
        """The rollouts that have not ended."""
        self._persistence = persistence
        self._unknown = unknown
        self._after = after_revision
        self._progress = after_revision or 0
        self._told: dict[str, int] = {}

    async def look(self, rollout_ids: Sequence[str]) -> AsyncGenerator[RolloutEvent, None]:
        """Tell what is new about these rollouts, the first time about all of them.

        Raises:
            RevisionGoneError: The first time: the store has not come as far as `after_revision`.
            UnknownIdError: The first time: there is no such rollout.
        """
        settled = await self._persistence.settled_revision()
        if self._after is not None and self._after > settled:
            raise RevisionGoneError(
                f"a watch cannot go on from revision {self._after}: this store has come to {settled} only, so that "
                "one is of another store, or of this one before it was restored; watch without after_revision"
            )
        last: RolloutRecord | None = None
        for ids in slices(rollout_ids, _AT_ONCE):
            for record in await self._news(ids):
                if last is not None:
                    yield self._event(last)
                last = record
        self._after = None
        self._progress = max(self._progress, settled)  # once all was looked at, and told but for the last
        if last is not None:
            yield self._event(last)

    async def _news(self, rollout_ids: Sequence[str]) -> list[RolloutRecord]:
        records = await self._persistence.get_rollouts(rollout_ids)
        for rollout_id in rollout_ids:
            if rollout_id not in records:
                if rollout_id not in self._told and not await self._was_dropped(rollout_id):
                    raise await self._unknown(rollout_id)
                self.pending.discard(rollout_id)
        return sorted(
            (record for record in records.values() if self._is_news(record)),
            key=lambda record: record.revision,
        )

    async def _was_dropped(self, rollout_id: str) -> bool:
        """Whether a watch that goes on lost a rollout in between, which only befalls those that ended."""
        return self._after is not None and await self._persistence.why_gone(rollout_id) is not None

    def _is_news(self, record: RolloutRecord) -> bool:
        if lifecycle.is_finished(record):
            self.pending.discard(record.rollout_id)
        else:
            self.pending.add(record.rollout_id)
        seen = hash(lifecycle.visible(record))
        known = self._told.get(record.rollout_id)
        self._told[record.rollout_id] = seen
        if known is None:
            return self._after is None or record.revision > self._after
        return seen != known

    def _event(self, record: RolloutRecord) -> RolloutEvent:
        return RolloutEvent.model_construct(
            rollout=record.to_rollout(), revision=record.revision, progress_revision=self._progress
        )
