"""Handing out the head of the queue, when many servers do so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from zlib import crc32

from lightning.store import lifecycle
from lightning.store.persistence.abc import AttemptTakenError, ClaimTransition, RolloutChange
from lightning.store.persistence.mongo.batches import Batcher
from lightning.store.persistence.mongo.connection import Document, MongoConnection
from lightning.store.persistence.mongo.records import MongoRecords, Read
from lightning.store.records import RolloutRecord

_MAX_CLAIMS_AT_ONCE = 1024
_MAX_HEADS_AT_ONCE = 64
_CONTENDED_CLAIMS = 256
"""For so many claims after it lost a rollout to another server, a server minds the others."""
_SLACK = 2
"""How much further than on average needed it looks then, for enough that are its own."""

Head = Read[RolloutRecord]


@dataclass
class _Wish:
    """A claim's wish for some heads of the queue."""

    count: int
    heads: list[Head] = field(default_factory=list)
    withdrawn: bool = False


class MongoQueue:
    """The queued rollouts of a partition, for one event loop.

    A claim reads the head of the queue and swaps it for what the transition makes of it; the one whose swap succeeds
    has it. A server that dies in between has changed nothing. Claims on one loop look at the queue together and never
    at the same rollout. Servers that find themselves in each other's way share out the first few, by their ids, and
    look at the very head again from time to time; without competition the order is exact.

    Args:
        connection: The connection of the loop.
        rollouts: The rollouts.
        partition: Whose.
        place: Which of how many servers this is, from 0.
    """

    def __init__(
        self,
        connection: MongoConnection,
        rollouts: MongoRecords[RolloutRecord],
        partition: str,
        place: Callable[[], tuple[int, int]],
    ) -> None:
        self._connection = connection
        self._rollouts = rollouts
        self._partition = partition
        self._place = place
        self._in_hand: set[str] = set()
        """Rollouts that a claim on this loop is about to take."""
        self._put_down = asyncio.Event()
        self._contended = 0
        """For how many claims to mind other servers."""
        self._looks: Batcher[_Wish, None] = Batcher(self._look, max_items=_MAX_CLAIMS_AT_ONCE, max_batches=1)

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._looks.close()

    async def claim(self, limit: int, transition: ClaimTransition) -> list[RolloutChange]:
        """See `Persistence.claim_rollouts`."""
        changes: list[RolloutChange] = []
        mine: set[str] = set()  # what it has in hand
        try:
            while len(changes) < limit:
                heads = await self._pick_up(min(limit - len(changes), _MAX_HEADS_AT_ONCE), mine)
                if not heads:
                    break
                for taken, head in enumerate(heads, start=len(changes)):
                    transition(head.record, taken)  # a refusal is to come before anything is changed
                for head in heads:
                    try:
                        change = await self._take(head, transition, len(changes))
                    except AttemptTakenError:
                        if not changes:
                            raise
                        return changes
                    if change is not None:
                        changes.append(change)
                    if change is None or not lifecycle.is_queued(change.after):
                        mine.discard(head.record.rollout_id)
                        self._put_back({head.record.rollout_id})
        finally:
            self._put_back(mine)
        return changes

    async def order(self) -> list[str]:
        """See `Persistence.queue_order`."""
        queued = {"partition": self._partition, "queue": {"$exists": True}}
        find = self._rollouts.collection.find
        found = await self._connection.run(lambda: find(queued, {"_id": 1}).sort("queue", 1).to_list())
        return [document["_id"]["rollout_id"] for document in found]

    async def _pick_up(self, count: int, mine: set[str]) -> list[Head]:
        """The first rollouts that nobody on this loop has in hand, which are `mine` then; none if the queue holds no
        others than mine. It waits for other claims only with nothing in hand: they may wait for this one."""
        while True:
            wish = _Wish(count)
            try:
                await self._looks.do(wish)
            except BaseException:
                wish.withdrawn = True
                self._put_back({head.record.rollout_id for head in wish.heads})
                raise
            mine.update(head.record.rollout_id for head in wish.heads)
            others = self._in_hand - mine
            if wish.heads or mine or not others:
                return wish.heads
            while others & self._in_hand:  # whoever has them may yet fail to take them
                await self._put_down.wait()

    async def _look(self, wishes: list[_Wish]) -> list[None]:
        wanted = sum(wish.count for wish in wishes)
        condition: dict[str, object] = {"partition": self._partition, "queue": {"$exists": True}}
        if self._in_hand:
            keys = [{"partition": self._partition, "rollout_id": rollout_id} for rollout_id in self._in_hand]
            condition["_id"] = {"$nin": keys}
        find = self._rollouts.collection.find
        rank, servers = self._place() if self._contended else (0, 1)
        width = wanted if servers == 1 else wanted * servers * _SLACK
        documents = await self._connection.persist(
            lambda: find(condition).sort("queue", 1).limit(width).to_list()
        )
        if len(documents) > wanted:
            of_others = [_slot(document) % servers != rank for document in documents]
            # its own first, then what others are likely to come to last
            order = sorted(range(len(documents)), key=lambda i: (of_others[i], -i if of_others[i] else i))
            documents = [documents[index] for index in sorted(order[:wanted])]
        reads = await self._rollouts.decode_all(documents)
        heads = iter([read for read in reads if lifecycle.is_queued(read.record)])
        for wish in wishes:
            if not wish.withdrawn:
                wish.heads = list(islice(heads, wish.count))
                self._in_hand.update(head.record.rollout_id for head in wish.heads)
        return [None] * len(wishes)

    async def _take(self, head: Head, transition: ClaimTransition, taken: int) -> RolloutChange | None:
        """Swap a head for what the transition makes of it; None if it is in the queue no more."""
        read: Head | None = head
        while read is not None and lifecycle.is_queued(read.record):
            after = transition(read.record, taken)
            if after is read.record:
                return RolloutChange(after, after)
            swapped = await self._rollouts.swap(read, after)
            if swapped is not None:
                self._contended = max(0, self._contended - 1)
                return RolloutChange(read.record, swapped)
            read = await self._rollouts.read(head.record.rollout_id)  # changed, but maybe not taken
        self._contended = _CONTENDED_CLAIMS
        return None

    def _put_back(self, rollout_ids: set[str]) -> None:
        self._in_hand -= rollout_ids
        self._put_down.set()
        self._put_down = asyncio.Event()


def _slot(document: Document) -> int:
    """A number by which servers share rollouts out."""
    return crc32(document["_id"]["rollout_id"].encode())
