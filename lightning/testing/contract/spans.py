"""Spans: stored once, in order, exactly as they were, and a sign of life of their attempt."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_ATTEMPT,
    UNKNOWN_ROLLOUT,
    StoreTheme,
    everything,
    read,
    refused,
    same,
    statuses,
)
from lightning.testing.records import make_span
from lightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus

ATTRIBUTES: dict[str, Any] = {
    "text": "völlig\x00 normal \U0001f680",
    "empty": "",
    "truth": True,
    "integer": 1,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "real": 1.0,
    "tiny": 5e-324,
    "nan": math.nan,
    "infinite": [math.inf, -math.inf],
    "minus zero": -0.0,
    "texts": ["a", ""],
    "truths": [True, False],
    "integers": [1, 2**53 + 1],
    "reals": [0.1, 2.0],
    "nothing in it": [],
    "dotted.key": "a",
    "$key": "b",
}
CONTEXT = SpanContext(
    trace_id="ab" * 16, span_id="cd" * 8, is_remote=True, trace_state={"z": "first", "a": "second"}
)


def full_span(attempt: Any) -> Span:
    """A span with something in every field, and fields beyond them."""
    return make_span(
        attempt,
        sequence_id=7,
        trace_id="0123456789abcdef" * 2,
        span_id="0123456789abcdef",
        parent_id="fedcba9876543210",
        name="chat völlig\x00",
        status=TraceStatus(status_code="ERROR", description="no luck"),
        attributes=ATTRIBUTES,
        events=[
            Event(name="token", attributes={"index": 1, "p": math.nan}, timestamp=1_700_000_000.123456),
            Event(name="", attributes={}, timestamp=None),
        ],
        links=[Link(context=CONTEXT, attributes={"why": "retry"}), Link(context=CONTEXT, attributes=None)],
        start_time=1_700_000_000.000001,
        end_time=1_700_000_001.5,
        context=CONTEXT,
        parent=SpanContext(trace_id="0" * 31 + "1", span_id="0" * 15 + "1"),
        resource=OtelResource(attributes={"service.name": "agent", "n": [1, 2]}, schema_url="https://schema"),
        kind="CLIENT",
        further={"nested": [1, 1.0, None, {"a": []}]},
    )


class SpanContract(StoreTheme):
    """`add_span`, `add_many_spans` and `query_spans`."""

    # --- Kept as it was ---

    async def test_a_span_comes_back_as_it_was(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        span = full_span(started)
        stored = await store.add_span(span)
        assert stored is not None
        (found,) = await store.query_spans(started.rollout_id)
        for record in (stored, found):
            assert same(record.model_dump(), span.model_dump())

    async def test_a_span_may_have_next_to_nothing(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        span = make_span(started, name="", start_time=None, end_time=None, sequence_id=1)
        assert await store.add_span(span) == span
        assert list(await store.query_spans(started.rollout_id)) == [span]

    async def test_spans_are_copies(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        span = make_span(started, attributes={"list": [1]}, span_id="a" * 16)
        stored = await store.add_span(span)
        assert stored is not None
        (many,) = await store.add_many_spans([make_span(started, attributes={"list": [1]})])
        (found, _) = await store.query_spans(started.rollout_id)
        for record in (span, stored, many, found):
            record.attributes["list"].append(2)
            record.attributes["new"] = True
            record.name = "scribbled"
        for record in await store.query_spans(started.rollout_id):
            assert (record.attributes, record.name) == ({"list": [1]}, "step")

    async def test_what_is_returned_is_what_was_stored_whatever_the_caller_does_then(
        self, store: LightningStore
    ) -> None:
        started = await store.start_rollout("task")
        span = make_span(started, attributes={"list": [1]})
        stored = await store.add_many_spans([span])
        span.attributes["list"].append(2)
        span.name = "scribbled"
        assert [(record.attributes, record.name) for record in stored] == [({"list": [1]}, "step")]

    @pytest.mark.parametrize(
        ("kind", "mentions", "attributes"),
        [
            (TypeError, 'attributes["bad"]', {"good": 1, "bad": object()}),
            (TypeError, 'attributes["bad"][1]', {"bad": [1, {2}]}),
            (ValueError, 'attributes["bad"]', {"bad": 2**63}),
            (ValueError, 'attributes["bad"]', {"bad": "\ud800"}),
        ],
    )
    async def test_attributes_that_opentelemetry_lacks_are_refused(
        self, store: LightningStore, kind: type[Exception], mentions: str, attributes: Any
    ) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        with refused(kind, mentions):
            await store.add_span(make_span(started, attributes=attributes))
        with refused(kind, mentions):
            await store.add_many_spans([make_span(started), make_span(started, attributes=attributes)])
        assert await everything(store) == before

    async def test_further_fields_that_json_lacks_are_refused(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        with refused(TypeError, "further"):
            await store.add_span(make_span(started, further={1, 2}))
        assert await everything(store) == before

    # --- Stored once ---

    async def test_a_duplicate_is_skipped(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        first = await store.add_span(make_span(started, span_id="a" * 16, name="first"))
        assert await store.add_span(make_span(started, span_id="a" * 16, name="second")) is None
        assert list(await store.query_spans(started.rollout_id)) == [first]
        assert await store.get_next_span_sequence_id(started.rollout_id, started.attempt.attempt_id) == 2

    async def test_duplicates_among_many_are_left_out(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        spans = [make_span(started, span_id=f"{n % 3:016x}", name=str(n)) for n in range(5)]
        stored = await store.add_many_spans(spans[:1])
        assert [span.name for span in stored] == ["0"]
        stored = await store.add_many_spans(spans)
        assert [(span.name, span.sequence_id) for span in stored] == [("1", 2), ("2", 3)]
        assert [span.name for span in await store.query_spans(started.rollout_id)] == ["0", "1", "2"]
        assert list(await store.add_many_spans(spans)) == []

    async def test_the_same_span_id_may_occur_in_other_attempts(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        again = await store.start_attempt(first.rollout_id)
        other = await store.start_rollout("task")
        spans = [make_span(attempt, span_id="a" * 16) for attempt in (first, again, other)]
        assert len(await store.add_many_spans(spans)) == 3

    async def test_many_spans_may_be_none(self, store: LightningStore) -> None:
        assert list(await store.add_many_spans([])) == []

    async def test_many_spans_of_many_attempts_are_returned_in_order(self, store: LightningStore) -> None:
        first, second = await store.start_rollout("task"), await store.start_rollout("task")
        spans = [make_span((first, second)[n % 2], name=str(n)) for n in range(6)]
        stored = await store.add_many_spans(spans)
        assert [span.name for span in stored] == [str(n) for n in range(6)]
        assert [span.sequence_id for span in stored] == [1, 1, 2, 2, 3, 3]
        assert [span.name for span in await store.query_spans(second.rollout_id)] == ["1", "3", "5"]

    async def test_a_large_batch_is_stored(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        spans = [make_span(started, attributes={"text": "x" * 1000, "n": n}) for n in range(500)]
        assert len(await store.add_many_spans(spans)) == 500
        found = await store.query_spans(started.rollout_id)
        assert [span.attributes["n"] for span in found] == list(range(500))

    # --- Delivered, not returned ---

    async def test_delivered_spans_are_stored_once_and_counted(self, store: LightningStore) -> None:
        first, second = await store.start_rollout("task"), await store.start_rollout("task")
        spans = [make_span((first, second)[n % 2], name=str(n)) for n in range(6)]
        assert await store.deliver_spans(spans[:4]) == 4
        assert await store.deliver_spans([*spans, spans[5]]) == 2
        assert await store.deliver_spans(spans) == 0
        assert await store.deliver_spans([]) == 0
        for rollout, names in ((first, ["0", "2", "4"]), (second, ["1", "3", "5"])):
            found = await store.query_spans(rollout.rollout_id)
            assert [span.name for span in found] == names
            assert [span.sequence_id for span in found] == [1, 2, 3]
            assert await statuses(store, rollout.rollout_id) == ("running", "running")

    async def test_a_delivered_span_comes_back_as_it_was(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        span = full_span(started)
        assert await store.deliver_spans([span]) == 1
        (found,) = await store.query_spans(started.rollout_id)
        assert same(found.model_dump(), span.model_dump())

    async def test_a_bad_delivery_stores_nothing(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        good = make_span(started)
        with refused(ValueError, UNKNOWN_ATTEMPT):
            await store.deliver_spans([good, make_span(started, attempt_id=UNKNOWN_ATTEMPT)])
        with refused(TypeError, 'attributes["bad"]'):
            await store.deliver_spans([good, make_span(started, attributes={"bad": object()})])
        assert await everything(store) == before

    # --- Whose span ---

    async def test_spans_of_nobody_are_refused(self, store: LightningStore) -> None:
        started, other = await store.start_rollout("task"), await store.start_rollout("task")
        strangers = [
            (UNKNOWN_ROLLOUT, make_span(started, rollout_id=UNKNOWN_ROLLOUT)),
            (UNKNOWN_ATTEMPT, make_span(started, attempt_id=UNKNOWN_ATTEMPT)),
            (other.attempt.attempt_id, make_span(started, attempt_id=other.attempt.attempt_id)),
            ("latest", make_span(started, attempt_id="latest")),
        ]
        before = await everything(store)
        for mentions, stranger in strangers:
            with refused(ValueError, mentions):
                await store.add_span(stranger)
            with refused(ValueError, mentions):
                await store.add_many_spans([make_span(started), stranger])
        assert await everything(store) == before

    # --- A sign of life ---

    async def test_the_first_span_sets_it_running(self, store: LightningStore) -> None:
        await store.enqueue_rollout("task")
        started = await store.dequeue_rollout()
        assert started is not None
        await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.last_heartbeat_time is not None
        assert attempt.last_heartbeat_time >= attempt.start_time
        await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")

    async def test_many_spans_set_their_attempts_running(self, store: LightningStore) -> None:
        started = [await store.start_rollout("task") for _ in range(3)]
        await store.add_many_spans([make_span(rollout) for rollout in started[:2]])
        assert [(await read(store, r.rollout_id)).status for r in started] == [
            "running",
            "running",
            "preparing",
        ]

    @pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
    async def test_a_late_span_is_kept_and_changes_no_status(self, store: LightningStore, end: Any) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(started.rollout_id, status=end)
        closed = await store.get_latest_attempt(started.rollout_id)
        assert closed is not None
        stored = await store.add_span(make_span(started))
        assert list(await store.query_spans(started.rollout_id)) == [stored]
        assert await statuses(store, started.rollout_id) == (end, end)
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.last_heartbeat_time is not None
        assert attempt == closed.model_copy(update={"last_heartbeat_time": attempt.last_heartbeat_time})

    async def test_a_span_of_an_earlier_attempt_moves_only_that(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        await store.start_attempt(first.rollout_id)
        await store.add_span(make_span(first))
        assert await statuses(store, first.rollout_id) == ("preparing", "running", "preparing")

    async def test_a_first_span_takes_a_rollout_out_of_the_queue(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(started.rollout_id, status="requeuing")
        await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")
        assert await store.dequeue_rollout() is None

    # --- Read back ---

    async def test_spans_come_in_order(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        shuffled = [
            make_span(started, name="d", sequence_id=3, start_time=1.0, end_time=1.0),
            make_span(started, name="c", sequence_id=2, start_time=2.0, end_time=4.0),
            make_span(started, name="a", sequence_id=2, start_time=1.0, end_time=9.0),
            make_span(started, name="b", sequence_id=2, start_time=2.0, end_time=3.0),
        ]
        for span in shuffled:
            await store.add_span(span)
        assert [span.name for span in await store.query_spans(started.rollout_id)] == ["a", "b", "c", "d"]
        backwards = await store.query_spans(started.rollout_id, sort_order="desc")
        assert [span.sequence_id for span in backwards] == [3, 2, 2, 2]

    async def test_spans_come_attempt_by_attempt(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        second = await store.start_attempt(first.rollout_id)
        for name, attempt in (("c", second), ("a", first), ("d", second), ("b", first)):
            await store.add_span(make_span(attempt, name=name))
        found = await store.query_spans(first.rollout_id)
        assert [(span.name, span.sequence_id) for span in found] == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]
        backwards = await store.query_spans(first.rollout_id, sort_order="desc")
        assert [span.name for span in backwards] == ["d", "c", "b", "a"]

    async def test_spans_of_one_attempt_can_be_read(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        second = await store.start_attempt(first.rollout_id)
        for attempt in (first, second, second):
            await store.add_span(make_span(attempt))
        for attempt, count in ((first, 1), (second, 2)):
            found = await store.query_spans(first.rollout_id, attempt.attempt.attempt_id)
            assert [span.attempt_id for span in found] == [attempt.attempt.attempt_id] * count
        assert len(await store.query_spans(first.rollout_id, "latest")) == 2

    async def test_where_nothing_happened_there_are_no_spans(self, store: LightningStore) -> None:
        waiting, started = await store.enqueue_rollout("task"), await store.start_rollout("task")
        for rollout_id in (waiting.rollout_id, started.rollout_id):
            for attempt_id in (None, "latest"):
                found = await store.query_spans(rollout_id, attempt_id)
                assert (list(found), found.total) == ([], 0)

    async def test_spans_of_what_is_unknown_are_refused(self, store: LightningStore) -> None:
        started, other = await store.start_rollout("task"), await store.start_rollout("task")
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.query_spans(UNKNOWN_ROLLOUT)
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.query_spans(UNKNOWN_ROLLOUT, "latest")
        for stranger in (UNKNOWN_ATTEMPT, other.attempt.attempt_id):
            with refused(ValueError, stranger):
                await store.query_spans(started.rollout_id, stranger)
