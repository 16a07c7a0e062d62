"""Claiming work from a store that may be out of reach, and finding what a claim that was broken off has claimed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from lightning.backoff import STORE_AWAY, Backoff
from lightning.store.contract import LightningStore
from lightning.types import AttemptedRollout, AttemptRef

logger = logging.getLogger(__name__)

CLAIM_WAIT_SECONDS = 60.0
"""How long one call waits at the store for work; the next follows at once. Servers hold none longer by default."""
_RECOVERY_SECONDS = 1.0
_DOUBT_SECONDS = 30.0
"""How long after a call failed its server may still be at it: it claims until it has found the connection dead."""

StillHeld = Callable[[list[AttemptRef]], Awaitable[list[AttemptRef]]]
"""Tells which of these attempts are this process's to execute."""


class Claims:
    """A runner's claims.

    Args:
        store: Where work comes from.
        worker_id: The runner's name.
        instance_id: Its process.
        known: The attempts that it executes, at any time.
        still_held: Another process under this worker's name has attempts too, which are its own.
    """

    def __init__(
        self,
        store: LightningStore,
        worker_id: str,
        instance_id: str,
        *,
        known: Collection[str],
        still_held: StillHeld,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._instance_id = instance_id
        self._known = known
        self._still_held = still_held
        self._in_doubt_until: float | None = None

    async def take(self, limit: int) -> Sequence[AttemptedRollout]:
        """Claim up to `limit` rollouts, once there are any or the wait is over; tries as long as the store is away.

        A call that the store did not answer may have claimed all the same. That is looked for first when the store is
        back, and given instead.
        """
        backoff = Backoff()
        while True:
            try:
                claimed = await self._resolve_doubt() or await self._store.claim_rollouts(
                    limit=limit,
                    worker_id=self._worker_id,
                    instance_id=self._instance_id,
                    timeout=CLAIM_WAIT_SECONDS,
                )
            except STORE_AWAY as error:
                self._in_doubt_until = time.monotonic() + _DOUBT_SECONDS
                backoff.log_first(logger, "worker %s waits for the store: %s", self._worker_id, error)
                await backoff.sleep()
                continue
            if backoff.recovered():
                logger.info("worker %s reaches the store again", self._worker_id)
            return claimed

    async def _resolve_doubt(self) -> list[AttemptedRollout]:
        if self._in_doubt_until is None:
            return []
        looked = time.monotonic()
        found = await self._find_unanswered()
        if looked > self._in_doubt_until and not found:
            self._in_doubt_until = None
        return found

    async def unanswered(self) -> list[AttemptedRollout]:
        """What a `take` that was cancelled had claimed before it could say so. Raises nothing."""
        try:
            return await asyncio.wait_for(self._find_unanswered(), _RECOVERY_SECONDS)
        except Exception as error:  # noqa: BLE001  # the store may be going away too
            logger.debug("worker %s cannot tell whether it claimed something: %r", self._worker_id, error)
            return []

    async def _find_unanswered(self) -> list[AttemptedRollout]:
        worker = await self._store.get_worker_by_id(self._worker_id)
        if worker is None or worker.current_attempt_id in (None, *self._known):
            return []
        claimed = {
            rollout.attempt.attempt_id: rollout
            for rollout in await self._store.query_rollouts(status_in=["preparing"])
            if isinstance(rollout, AttemptedRollout) and rollout.attempt.worker_id == self._worker_id
        }
        unknown = [attempt_ref(rollout) for key, rollout in claimed.items() if key not in self._known]
        held = [ref.attempt_id for ref in await self._still_held(unknown)]
        for attempt_id in held:
            logger.info("attempt %s was claimed by a call that was broken off", attempt_id)
        return [claimed[attempt_id] for attempt_id in held]


def attempt_ref(rollout: AttemptedRollout) -> AttemptRef:
    """Names the attempt."""
    return AttemptRef(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id)
