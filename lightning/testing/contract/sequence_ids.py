"""Sequence ids: they number the spans of an attempt, strictly increasing, and none is issued twice."""

from __future__ import annotations

import asyncio

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import UNKNOWN_ATTEMPT, UNKNOWN_ROLLOUT, StoreTheme, refused
from lightning.testing.records import make_span

WRITERS = 64
SPANS_PER_WRITER = 8


class SequenceIdContract(StoreTheme):
    """`get_next_span_sequence_id`, `get_many_span_sequence_ids`, and the numbering of spans without a number."""

    async def test_they_count_from_one(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        assert [await store.get_next_span_sequence_id(*ids) for _ in range(4)] == [1, 2, 3, 4]

    async def test_each_attempt_has_its_own(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        second = await store.start_attempt(first.rollout_id)
        for attempt in (first.attempt, second.attempt):
            assert await store.get_next_span_sequence_id(first.rollout_id, attempt.attempt_id) == 1
            assert await store.get_next_span_sequence_id(first.rollout_id, attempt.attempt_id) == 2

    async def test_many_come_in_the_order_asked_for(self, store: LightningStore) -> None:
        first, second = await store.start_rollout("task"), await store.start_rollout("task")
        a, b = [(rollout.rollout_id, rollout.attempt.attempt_id) for rollout in (first, second)]
        assert list(await store.get_many_span_sequence_ids([a, b, a, a, b])) == [1, 1, 2, 3, 2]
        assert list(await store.get_many_span_sequence_ids([b, a])) == [3, 4]
        assert list(await store.get_many_span_sequence_ids([])) == []

    async def test_asking_is_no_sign_of_life(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.get_next_span_sequence_id(started.rollout_id, started.attempt.attempt_id)
        assert await store.get_rollout_by_id(started.rollout_id) == started

    async def test_what_is_unknown_is_refused_and_uses_up_nothing(self, store: LightningStore) -> None:
        started, other = await store.start_rollout("task"), await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        strangers = [
            (UNKNOWN_ROLLOUT, (UNKNOWN_ROLLOUT, started.attempt.attempt_id)),
            (UNKNOWN_ATTEMPT, (started.rollout_id, UNKNOWN_ATTEMPT)),
            (other.attempt.attempt_id, (started.rollout_id, other.attempt.attempt_id)),
        ]
        for mentions, stranger in strangers:
            with refused(ValueError, mentions):
                await store.get_next_span_sequence_id(*stranger)
            with refused(ValueError, mentions):
                await store.get_many_span_sequence_ids([ids, stranger])
        assert await store.get_next_span_sequence_id(*ids) == 1

    async def test_spans_without_a_number_get_the_next(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        first = await store.add_span(make_span(started))
        assert await store.get_next_span_sequence_id(*ids) == 2
        third = await store.add_span(make_span(started))
        assert [span and span.sequence_id for span in (first, third)] == [1, 3]
        many = await store.add_many_spans([make_span(started), make_span(started)])
        assert [span.sequence_id for span in many] == [4, 5]

    async def test_an_explicit_number_is_kept_and_counted_on_from(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        numbers = []
        for asked_for in (10, 0, 4, 0):
            span = await store.add_span(make_span(started, sequence_id=asked_for))
            numbers.append(span and span.sequence_id)
        assert numbers == [10, 11, 4, 12]
        assert await store.get_next_span_sequence_id(*ids) == 13
        many = await store.add_many_spans([make_span(started, sequence_id=n) for n in (0, 20, 0)])
        assert [span.sequence_id for span in many] == [14, 20, 21]

    async def test_several_spans_may_share_a_number(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        number = await store.get_next_span_sequence_id(*ids)
        for _ in range(2):
            assert await store.add_span(make_span(started, sequence_id=number)) is not None
        found = await store.query_spans(started.rollout_id)
        assert [span.sequence_id for span in found] == [number, number]

    async def test_closed_attempts_are_still_numbered(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(started.rollout_id, status="cancelled")
        assert await store.get_next_span_sequence_id(started.rollout_id, started.attempt.attempt_id) == 1

    async def test_many_writers_at_once_get_all_numbers_once(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)

        async def write(number: int) -> list[int]:
            mine: list[int] = []
            for turn in range(SPANS_PER_WRITER):
                if (number + turn) % 3 == 0:
                    mine.append(await store.get_next_span_sequence_id(*ids))
                elif (number + turn) % 3 == 1:
                    mine.extend(await store.get_many_span_sequence_ids([ids, ids]))
                else:
                    span = await store.add_span(make_span(started))
                    assert span is not None
                    mine.append(span.sequence_id)
            return mine

        written = await self.soon(asyncio.gather(*(write(number) for number in range(WRITERS))))
        assert all(mine == sorted(mine) for mine in written)
        numbers = sorted(number for mine in written for number in mine)
        assert numbers == list(range(1, len(numbers) + 1))
