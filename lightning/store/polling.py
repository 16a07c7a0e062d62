"""Watching rollouts in a store that cannot tell when something happens: by looking again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING

from lightning.types import Rollout, RolloutEvent, encode_payload

if TYPE_CHECKING:
    from lightning.store.contract import LightningStore

_POLL_SECONDS = 0.05
_POLL_SHARE = 0.1
"""Looking may take no more than this part of the time."""
_AT_ONCE = 32
"""How many rollouts are held at a time."""

_ENDED = frozenset({"succeeded", "failed", "cancelled"})


class RevisionGoneError(RuntimeError):
    """A watch cannot go on from that revision: the store is another since, or keeps none. Watch without one; that
    begins with how things are now."""


async def poll_rollouts(
    store: LightningStore, rollout_ids: Sequence[str]
) -> AsyncGenerator[RolloutEvent, None]:
    """`LightningStore.watch_rollouts` on nothing but queries. The revisions it tells are times, and no help later."""
    told: dict[str, int] = {}
    revision = 0
    while True:
        began = time.monotonic()
        pending = False
        for ids in slices(rollout_ids, _AT_ONCE):
            found = await store.query_rollouts(rollout_id_in=ids)
            for rollout_id in set(ids) - {rollout.rollout_id for rollout in found} - told.keys():
                await store.get_latest_attempt(rollout_id)  # raises what the store says of an unknown id
            for rollout in found:
                pending = pending or rollout.status not in _ENDED
                seen = _visible(rollout)
                if told.get(rollout.rollout_id) != seen:
                    told[rollout.rollout_id] = seen
                    revision = max(revision + 1, time.time_ns() // 1000)
                    yield RolloutEvent.model_construct(
                        rollout=rollout, revision=revision, progress_revision=revision
                    )
        if not pending:
            return
        await asyncio.sleep(max(_POLL_SECONDS, (time.monotonic() - began) / _POLL_SHARE))


def slices(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut a list into lists of at most `size`."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _visible(rollout: Rollout) -> int:
    """As `lifecycle.visible`, in the size of a number."""
    fields = rollout.model_dump(exclude={"attempt": {"last_heartbeat_time"}})
    return hash(encode_payload(fields, "rollout"))
