"""Queries: filters, sorting and pages, alike for everything that can be queried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_ROLLOUT,
    StoreTheme,
    check_bad_pages,
    check_pages,
    check_sorting,
    read,
    refused,
)
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout, PromptTemplate, Rollout, Span


async def some_rollouts(store: LightningStore) -> list[Rollout]:
    """Rollouts of all statuses, in order of creation, as they are now."""
    await store.add_resources({"prompt": PromptTemplate(template="one")})
    ids = [(await store.enqueue_rollout(n, mode=("train", "val", None)[n % 3])).rollout_id for n in range(7)]
    wanted: list[Any] = ["succeeded", "queuing", "running", "cancelled", "requeuing", "failed", "preparing"]
    for rollout_id, status in zip(ids, wanted, strict=True):
        await store.update_rollout(rollout_id, status=status)
    await store.update_rollout(ids[3], resources_id=None)
    return [await read(store, rollout_id) for rollout_id in ids]


class RolloutQueryContract(StoreTheme):
    """`query_rollouts`."""

    async def test_all_rollouts_come_in_order_of_creation(self, store: LightningStore) -> None:
        assert list(await store.query_rollouts()) == []
        rollouts = await some_rollouts(store)
        await check_pages(store.query_rollouts, rollouts)
        await check_pages(store.query_rollouts, rollouts[::-1], sort_order="desc")

    async def test_rollouts_by_status(self, store: LightningStore) -> None:
        rollouts = await some_rollouts(store)
        wanted: list[list[Any]] = [
            [],
            ["queuing"],
            ["queuing", "requeuing"],
            ["failed", "succeeded", "cancelled"],
            ["preparing", "running", "preparing"],
            ["queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled"],
        ]
        for status_in in wanted:
            expected = [rollout for rollout in rollouts if rollout.status in status_in]
            await check_pages(store.query_rollouts, expected, status_in=status_in)
            await check_pages(store.query_rollouts, expected[::-1], status_in=status_in, sort_order="desc")
            await check_pages(store.query_rollouts, expected, status=status_in)

    async def test_rollouts_by_id(self, store: LightningStore) -> None:
        rollouts = await some_rollouts(store)
        ids = [rollout.rollout_id for rollout in rollouts]
        for wanted in ([], [ids[3]], [ids[5], UNKNOWN_ROLLOUT, ids[0], ids[5]], ids[::-1]):
            expected = [rollout for rollout in rollouts if rollout.rollout_id in wanted]
            await check_pages(store.query_rollouts, expected, rollout_id_in=wanted)
            await check_pages(store.query_rollouts, expected, rollout_ids=wanted)

    async def test_rollouts_by_part_of_the_id(self, store: LightningStore) -> None:
        rollouts = await some_rollouts(store)
        await check_pages(store.query_rollouts, rollouts, rollout_id_contains="ro-")
        await check_pages(store.query_rollouts, [], rollout_id_contains="no such part")
        part = rollouts[2].rollout_id[5:20]
        await check_pages(store.query_rollouts, [rollouts[2]], rollout_id_contains=part)

    async def test_wildcards_stand_for_themselves(self, store: LightningStore) -> None:
        await some_rollouts(store)
        for text in ("%", "_", "r%", "*", ".*", "[r]", "^ro", "\\"):
            assert (await store.query_rollouts(rollout_id_contains=text)).total == 0, text

    async def test_filters_of_rollouts_are_joined(self, store: LightningStore) -> None:
        rollouts = await some_rollouts(store)
        first, last = rollouts[0], rollouts[-1]
        filters: dict[str, Any] = {
            "status_in": [first.status],
            "rollout_id_in": [first.rollout_id, last.rollout_id],
        }
        await check_pages(store.query_rollouts, [first], **filters)
        await check_pages(store.query_rollouts, [first], **filters, filter_logic="and")
        await check_pages(store.query_rollouts, [first, last], **filters, filter_logic="or")
        filters["rollout_id_contains"] = rollouts[3].rollout_id[3:]
        await check_pages(store.query_rollouts, [], **filters)
        await check_pages(store.query_rollouts, [first, rollouts[3], last], **filters, filter_logic="or")
        nothing: dict[str, Any] = {"status_in": [], "rollout_id_in": [first.rollout_id]}
        await check_pages(store.query_rollouts, [], **nothing)
        await check_pages(store.query_rollouts, [first], **nothing, filter_logic="or")
        await check_pages(store.query_rollouts, rollouts, filter_logic="or")

    async def test_rollouts_sorted_by_every_field(self, store: LightningStore) -> None:
        await some_rollouts(store)
        fields = ("rollout_id", "start_time", "end_time", "mode", "resources_id", "status")
        await check_sorting(store.query_rollouts, fields)
        await check_sorting(
            store.query_rollouts, fields, status_in=["succeeded", "cancelled", "failed", "running"]
        )

    async def test_equal_ones_keep_their_order(self, store: LightningStore) -> None:
        ids = [(await store.enqueue_rollout(n, mode="train")).rollout_id for n in range(5)]
        found = await store.query_rollouts(sort_by="mode")
        assert [rollout.rollout_id for rollout in found] == ids

    async def test_queries_of_rollouts_that_mean_nothing_are_refused(self, store: LightningStore) -> None:
        await check_bad_pages(store.query_rollouts)
        bad: dict[str, Any]
        for bad, mentions in (
            ({"status_in": ["running", "unresponsive"]}, "unresponsive"),
            ({"status_in": "running"}, "running"),
            ({"rollout_id_in": "ro-1"}, "ro-1"),
            ({"filter_logic": "xor"}, "xor"),
        ):
            with refused(ValueError, mentions):
                await store.query_rollouts(**bad)


class AttemptQueryContract(StoreTheme):
    """`query_attempts`."""

    async def test_all_attempts_of_one_rollout(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        await check_pages(store.query_attempts, [], rollout_id=rollout.rollout_id)
        other = await store.start_rollout("task")
        made = [(await store.start_attempt(rollout.rollout_id)).attempt for _ in range(4)]
        await check_pages(store.query_attempts, made, rollout_id=rollout.rollout_id)
        await check_pages(store.query_attempts, made[::-1], rollout_id=rollout.rollout_id, sort_order="desc")
        await check_pages(store.query_attempts, made, rollout_id=rollout.rollout_id, sort_by=None)
        await check_pages(store.query_attempts, [other.attempt], rollout_id=other.rollout_id)

    async def test_attempts_sorted_by_every_field(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        for worker_id in ("w-2", None, "w-1", "w-3"):
            attempt = (await store.start_attempt(rollout.rollout_id, worker_id=worker_id)).attempt
            if worker_id == "w-1":
                await store.update_attempt(rollout.rollout_id, attempt.attempt_id, status="failed")
            if worker_id == "w-2":
                await store.add_span(make_span(attempt))
        fields = (
            "attempt_id",
            "sequence_id",
            "start_time",
            "end_time",
            "status",
            "worker_id",
            "last_heartbeat_time",
        )
        await check_sorting(store.query_attempts, fields, rollout_id=rollout.rollout_id)

    async def test_queries_of_attempts_that_mean_nothing_are_refused(self, store: LightningStore) -> None:
        rollout = await store.start_rollout("task")
        await check_bad_pages(store.query_attempts, rollout_id=rollout.rollout_id)
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.query_attempts(UNKNOWN_ROLLOUT, limit=0)


async def some_spans(store: LightningStore) -> tuple[AttemptedRollout, list[Span]]:
    """A rollout and its spans, in order."""
    started = await store.start_rollout("task")
    root = "a" * 16
    made = [
        make_span(started, trace_id="1" * 32, span_id=root, name="agent"),
        make_span(started, trace_id="1" * 32, span_id="b" * 16, parent_id=root, name="chat %"),
        make_span(started, trace_id="1" * 32, span_id="c" * 16, parent_id=root, name="tool", start_time=0.5),
        make_span(started, trace_id="2" * 32, span_id="ab" * 8, name="chat again", end_time=None),
        make_span(started, trace_id="2" * 32, span_id="d" * 16, parent_id="ab" * 8, name="", start_time=None),
    ]
    return started, list(await store.add_many_spans(made))


class SpanQueryContract(StoreTheme):
    """The filters, sorting and pages of `query_spans`."""

    async def test_spans_in_pages(self, store: LightningStore) -> None:
        started, spans = await some_spans(store)
        await check_pages(store.query_spans, spans, rollout_id=started.rollout_id)
        await check_pages(store.query_spans, spans, rollout_id=started.rollout_id, attempt_id="latest")
        await check_pages(store.query_spans, spans[::-1], rollout_id=started.rollout_id, sort_order="desc")

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({"trace_id": "1" * 32}, [0, 1, 2]),
            ({"trace_id": "1"}, []),
            ({"trace_id_contains": "22"}, [3, 4]),
            ({"span_id": "b" * 16}, [1]),
            ({"span_id_contains": "aa"}, [0]),
            ({"span_id_contains": "a"}, [0, 3]),
            ({"parent_id": "a" * 16}, [1, 2]),
            ({"parent_id_contains": "ab"}, [4]),
            ({"parent_id_contains": "a"}, [1, 2, 4]),
            ({"name": "tool"}, [2]),
            ({"name": ""}, [4]),
            ({"name_contains": "chat"}, [1, 3]),
            ({"name_contains": "%"}, [1]),
            ({"name_contains": ""}, [0, 1, 2, 3, 4]),
            ({"name_contains": "chat", "trace_id": "1" * 32}, [1]),
            ({"name_contains": "chat", "trace_id": "1" * 32, "filter_logic": "or"}, [0, 1, 2, 3]),
            ({"parent_id": "a" * 16, "parent_id_contains": "ab", "filter_logic": "or"}, [1, 2, 4]),
            ({"name": "tool", "span_id": "b" * 16}, []),
            ({"filter_logic": "or"}, [0, 1, 2, 3, 4]),
        ],
    )
    async def test_spans_filtered(
        self, store: LightningStore, filters: dict[str, Any], expected: Sequence[int]
    ) -> None:
        started, spans = await some_spans(store)
        matches = [spans[index] for index in expected]
        await check_pages(store.query_spans, matches, rollout_id=started.rollout_id, **filters)

    async def test_spans_filtered_within_an_attempt(self, store: LightningStore) -> None:
        started, spans = await some_spans(store)
        again = await store.start_attempt(started.rollout_id)
        (other,) = await store.add_many_spans([make_span(again, name="tool")])
        arguments: dict[str, Any] = {"rollout_id": started.rollout_id, "name": "tool"}
        await check_pages(store.query_spans, [spans[2], other], **arguments)
        await check_pages(store.query_spans, [other], **arguments, attempt_id="latest")
        await check_pages(
            store.query_spans,
            [spans[2]],
            **arguments,
            attempt_id=started.attempt.attempt_id,
            filter_logic="or",
        )

    async def test_spans_sorted_by_every_field(self, store: LightningStore) -> None:
        started, _ = await some_spans(store)
        fields = (
            "sequence_id",
            "trace_id",
            "span_id",
            "parent_id",
            "name",
            "start_time",
            "end_time",
            "attempt_id",
        )
        await check_sorting(store.query_spans, fields, rollout_id=started.rollout_id)

    async def test_queries_of_spans_that_mean_nothing_are_refused(self, store: LightningStore) -> None:
        started, _ = await some_spans(store)
        await check_bad_pages(store.query_spans, rollout_id=started.rollout_id)
        logic: Any = "xor"
        with refused(ValueError, "xor"):
            await store.query_spans(started.rollout_id, filter_logic=logic)


class ResourcesQueryContract(StoreTheme):
    """`query_resources`."""

    async def test_all_versions_of_all_ids(self, store: LightningStore) -> None:
        await check_pages(store.query_resources, [])
        first = await store.add_resources({"prompt": PromptTemplate(template="one")})
        other = await store.add_resources({"prompt": PromptTemplate(template="other")})
        second = await store.update_resources(first.resources_id, {"prompt": PromptTemplate(template="two")})
        updates = [first, other, second]
        await check_pages(store.query_resources, updates)
        await check_pages(store.query_resources, updates[::-1], sort_order="desc")
        await check_pages(store.query_resources, [first, second], resources_id=first.resources_id)
        part = other.resources_id[4:20]
        await check_pages(store.query_resources, [other], resources_id_contains=part)
        await check_pages(store.query_resources, updates, resources_id_contains="rs-")
        await check_pages(
            store.query_resources, [], resources_id=first.resources_id, resources_id_contains=part
        )
        await check_pages(store.query_resources, [], resources_id_contains="%")
        await check_sorting(store.query_resources, ("resources_id", "version", "create_time", "update_time"))

    async def test_queries_of_resources_that_mean_nothing_are_refused(self, store: LightningStore) -> None:
        await check_bad_pages(store.query_resources)


class WorkerQueryContract(StoreTheme):
    """`query_workers`."""

    async def test_workers_filtered_and_in_pages(self, store: LightningStore) -> None:
        await check_pages(store.query_workers, [])
        for worker_id in ("b-unknown", "a-busy", "d-idle", "c-busy%"):
            await store.update_worker(worker_id, {"name": worker_id})
            if "unknown" not in worker_id:
                started = await store.start_rollout("task", worker_id=worker_id)
            if "idle" in worker_id:
                await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        unknown, busy, idle, also_busy = workers = list(await store.query_workers())
        assert [worker.status for worker in workers] == ["unknown", "busy", "idle", "busy"]
        query = store.query_workers
        await check_pages(query, workers)
        await check_pages(query, workers[::-1], sort_order="desc")
        await check_pages(query, [busy, also_busy], status_in=["busy"])
        await check_pages(query, [unknown, idle], status_in=["idle", "unknown"])
        await check_pages(query, [], status_in=[])
        await check_pages(query, [busy, also_busy], worker_id_contains="busy")
        await check_pages(query, [also_busy], worker_id_contains="%")
        await check_pages(query, [also_busy], worker_id_contains="c-", status_in=["busy"])
        await check_pages(query, [], worker_id_contains="idle", status_in=["busy"])
        await check_pages(
            query, [busy, idle, also_busy], worker_id_contains="idle", status_in=["busy"], filter_logic="or"
        )

    async def test_workers_sorted_by_every_field(self, store: LightningStore) -> None:
        await store.update_worker("b")
        await store.start_rollout("task", worker_id="c")
        await store.enqueue_rollout("task")
        await store.dequeue_rollout(worker_id="a")
        fields = (
            "worker_id",
            "status",
            "last_heartbeat_time",
            "last_dequeue_time",
            "last_busy_time",
            "last_idle_time",
            "current_rollout_id",
            "current_attempt_id",
        )
        await check_sorting(store.query_workers, fields)

    async def test_queries_of_workers_that_mean_nothing_are_refused(self, store: LightningStore) -> None:
        await check_bad_pages(store.query_workers)
        bad: dict[str, Any]
        for bad, mentions in (
            ({"status_in": ["busy", "lazy"]}, "lazy"),
            ({"status_in": "busy"}, "busy"),
            ({"filter_logic": "xor"}, "xor"),
        ):
            with refused(ValueError, mentions):
                await store.query_workers(**bad)
