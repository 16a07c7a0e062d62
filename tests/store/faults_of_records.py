"""Faults in what is stored and how it is found again."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from planting import Patch, caught_by, change_page

from lightning.store import lifecycle, queries, reading, records, watching
from lightning.store.engine import StoreEngine
from lightning.store.persistence.memory import MemoryPersistence
from lightning.store.queries import Page, RolloutQuery
from lightning.types import payload

# --- Watching --------------------------------------------------------------------------------------------------


@caught_by("test_a_heartbeat_is_no_news")
def heartbeats_are_news(patch: Patch) -> None:
    original = lifecycle.visible

    def visible(record: Any) -> Any:
        latest = record.latest_attempt
        return (*original(record), latest and latest.last_heartbeat_time)

    patch.setattr(lifecycle, "visible", visible)


@caught_by("test_a_rollout_is_followed_to_its_end")
def watchers_see_statuses_only(patch: Patch) -> None:
    patch.setattr(lifecycle, "visible", lambda record: record.status)


@caught_by("test_a_watch_goes_on_where_it_broke_off")
def a_watch_that_goes_on_misses_what_happened_meanwhile(patch: Patch) -> None:
    original = watching.RolloutWatch._is_news

    def is_news(self: Any, record: Any) -> bool:
        goes_on = self._after is not None
        return original(self, record) and not goes_on

    patch.setattr(watching.RolloutWatch, "_is_news", is_news)


# --- Spans -----------------------------------------------------------------------------------------------------


@caught_by("test_the_first_span_sets_it_running", "test_many_spans_set_their_attempts_running")
def spans_set_nothing_running(patch: Patch) -> None:
    original = lifecycle.receive_spans

    def receive(record: Any, attempt_id: str, spans: Any, now: float) -> Any:
        after, numbers = original(record, attempt_id, spans, now)
        attempt = after.find_attempt(attempt_id)
        return after._replace(
            status=record.status,
            attempts=lifecycle._swap(
                after.attempts, attempt, attempt._replace(status=record.find_attempt(attempt_id).status)
            ),
        ), numbers

    patch.setattr(lifecycle, "receive_spans", receive)


@caught_by(
    "test_a_duplicate_is_skipped",
    "test_duplicates_among_many_are_left_out",
    "test_a_duplicate_of_the_sdk_is_skipped",
)
def duplicates_are_stored(patch: Patch) -> None:
    original = MemoryPersistence.append_spans

    async def append(
        self: Any, rollout_id: str, attempt_id: str, spans: Any, transition: Any, settle: Any = None
    ) -> Any:
        renamed = [span._replace(span_id=uuid.uuid4().hex) for span in spans]
        return await original(self, rollout_id, attempt_id, renamed, transition, settle)

    patch.setattr(MemoryPersistence, "append_spans", append)


@caught_by("test_a_duplicate_is_skipped")
def a_duplicate_replaces_the_first(patch: Patch) -> None:
    original = MemoryPersistence.append_spans

    async def append(
        self: Any, rollout_id: str, attempt_id: str, spans: Any, transition: Any, settle: Any = None
    ) -> Any:
        known = self._rollouts[rollout_id].spans
        for span in spans:
            if known is not None and span.span_id in known.by_attempt.get(attempt_id, {}):
                known.put(attempt_id, [span])
        return await original(self, rollout_id, attempt_id, spans, transition, settle)

    patch.setattr(MemoryPersistence, "append_spans", append)


@caught_by("test_a_late_span_is_kept_and_changes_no_status", "test_a_timed_out_attempt_is_not_revived")
def late_spans_are_thrown_away(patch: Patch) -> None:
    original = MemoryPersistence.append_spans

    async def append(
        self: Any, rollout_id: str, attempt_id: str, spans: Any, transition: Any, settle: Any = None
    ) -> Any:
        attempt = self._rollouts[rollout_id].record.find_attempt(attempt_id)
        kept = spans if lifecycle.is_open(attempt) else []
        change, receipts = await original(self, rollout_id, attempt_id, kept, transition)
        return change, receipts + [records.SpanReceipt(0, False)] * (len(spans) - len(kept))

    patch.setattr(MemoryPersistence, "append_spans", append)


@caught_by("test_spans_of_nobody_are_refused")
def spans_are_stored_until_one_is_refused(patch: Patch) -> None:
    async def nothing(self: Any, keys: Any) -> None:
        return

    patch.setattr(StoreEngine, "_check_attempts_exist", nothing)


@caught_by("test_spans_come_in_order")
def spans_come_as_they_arrived(patch: Patch) -> None:
    async def find(self: Any, rollout_id: str, attempt_ids: Any) -> Any:
        spans = self._rollouts[rollout_id].spans
        found = [] if spans is None else [span for a in attempt_ids for span in spans.of(a)]
        return [span._replace(sequence_id=n) for n, span in enumerate(found, start=1)]

    patch.setattr(MemoryPersistence, "find_spans", find)


@caught_by("test_a_span_comes_back_as_it_was", "test_its_parts_are_stored")
def attributes_lose_their_types(patch: Patch) -> None:
    original = records.SpanRecord.of

    def of(span: Any) -> Any:
        attributes = {key: int(v) if v == 1.0 else v for key, v in span.attributes.items()}
        return original(span.model_copy(update={"attributes": attributes}))

    patch.setattr(records.SpanRecord, "of", staticmethod(of))


@caught_by("test_they_count_from_one", "test_many_writers_at_once_get_all_numbers_once")
def a_sequence_id_is_issued_twice(patch: Patch) -> None:
    original = lifecycle.allocate_span_sequence_ids

    def allocate(record: Any, attempt_id: str, count: int) -> Any:
        again = lifecycle.last_span_sequence_id(record, attempt_id) % 3 == 2
        return record if again else original(record, attempt_id, count)

    patch.setattr(lifecycle, "allocate_span_sequence_ids", allocate)


@caught_by("test_an_explicit_number_is_kept_and_counted_on_from")
def explicit_numbers_are_not_counted_on_from(patch: Patch) -> None:
    original = lifecycle.receive_spans

    def receive(record: Any, attempt_id: str, spans: Any, now: float) -> Any:
        _, numbers = original(record, attempt_id, spans, now)
        after, _ = original(record, attempt_id, [s for s in spans if not s.sequence_id], now)
        return after, numbers

    patch.setattr(lifecycle, "receive_spans", receive)


# --- Resources -------------------------------------------------------------------------------------------------


@caught_by("test_every_version_stays_readable", "test_a_rollback_is_a_look_up")
def only_the_newest_version_is_kept(patch: Patch) -> None:
    original = MemoryPersistence.get_resources

    async def get(self: Any, resources_id: str, version: int | None) -> Any:
        return await original(self, resources_id, None)

    patch.setattr(MemoryPersistence, "get_resources", get)


@caught_by("test_an_update_is_the_next_version_and_the_latest")
def an_update_does_not_become_the_latest(patch: Patch) -> None:
    async def latest(self: Any) -> Any:
        added = [record for record in self._resources_log if record.version == 1]
        return added[-1] if added else None

    patch.setattr(MemoryPersistence, "get_latest_resources", latest)


@caught_by("test_unknown_resources_are_refused", "test_an_update_of_a_rollout_is_refused_whole")
def unknown_resources_are_accepted(patch: Patch) -> None:
    async def nothing(self: Any, resources_id: str) -> None:
        return

    patch.setattr(StoreEngine, "_check_resources_exist", nothing)


@caught_by("test_without_an_id_the_latest_resources_are_bound", "test_a_rollout_stays_bound")
def no_resources_are_bound(patch: Patch) -> None:
    async def nothing(self: Any, resources_id: str | None) -> str | None:
        return resources_id

    patch.setattr(StoreEngine, "_bind_resources", nothing)


@caught_by("test_a_registered_type_survives", "test_built_in_types_survive")
def resources_forget_their_types(patch: Patch) -> None:
    patch.setattr(records.Resource, "from_fields", staticmethod(records.Resource.model_validate))


# --- Values and records ----------------------------------------------------------------------------------------


@caught_by("test_a_field_of_a_rollout", "test_many_fields_of_a_rollout_at_once")
def none_means_unset(patch: Patch) -> None:
    original = StoreEngine.update_rollout

    async def update(self: Any, rollout_id: str, **fields: Any) -> Any:
        return await original(self, rollout_id, **{k: v for k, v in fields.items() if v is not None})

    patch.setattr(StoreEngine, "update_rollout", update)


@caught_by("test_what_is_unset_in_a_rollout_stays", "test_a_field_of_a_rollout")
def unset_means_none(patch: Patch) -> None:
    original = StoreEngine.update_rollout

    async def update(self: Any, rollout_id: str, **fields: Any) -> Any:
        return await original(self, rollout_id, **{"metadata": None, **fields})

    patch.setattr(StoreEngine, "update_rollout", update)


@caught_by("test_an_update_of_a_rollout_is_refused_whole")
def half_of_a_bad_update_is_made(patch: Patch) -> None:
    original = StoreEngine.update_rollout

    async def update(self: Any, rollout_id: str, **fields: Any) -> Any:
        rollout = await self.get_rollout_by_id(rollout_id)
        for name, value in fields.items():
            rollout = await original(self, rollout_id, **{name: value})
        return rollout or await original(self, rollout_id)

    patch.setattr(StoreEngine, "update_rollout", update)


@caught_by("test_what_was_handed_out_is_a_copy", "test_waiting_hands_out_copies")
def configs_are_shared(patch: Patch) -> None:
    shared: dict[Any, Any] = {}
    original = records.ConfigRecord.to_config
    patch.setattr(records.ConfigRecord, "to_config", lambda self: shared.setdefault(self, original(self)))


@caught_by("test_what_was_handed_out_is_a_copy", "test_attempts_are_copies", "test_workers_are_copies")
def payloads_are_shared(patch: Patch) -> None:
    shared: dict[bytes, Any] = {}
    original = records.decode_payload
    patch.setattr(records, "decode_payload", lambda data: shared.setdefault(data, original(data)))


@caught_by("test_an_input_comes_back_as_it_was", "test_metadata_and_stats_come_back_as_they_were")
def whole_floats_become_integers(patch: Patch) -> None:
    original = payload._real
    patch.setattr(payload, "_real", lambda value, path: int(value) if value == 1.0 else original(value, path))


@caught_by("test_an_input_comes_back_as_it_was")
def large_integers_become_floats(patch: Patch) -> None:
    patch.setattr(payload, "_integer", lambda value, path: value if abs(value) < 2**53 else float(value))


@caught_by("test_what_is_no_json_is_refused")
def infinities_are_accepted(patch: Patch) -> None:
    patch.setattr(
        payload, "_real", lambda value, path: 0.0 if value in (float("inf"), float("-inf")) else value
    )


@caught_by("test_what_is_no_json_is_refused", "test_many_are_created_all_or_none")
def sets_become_lists(patch: Patch) -> None:
    original = payload._convert_other

    def convert(value: Any, path: Any) -> Any:
        return original(list(value) if isinstance(value, (set, frozenset)) else value, path)

    patch.setattr(payload, "_convert_other", convert)


@caught_by("test_what_is_no_json_is_refused")
def keys_become_strings(patch: Patch) -> None:
    patch.setattr(payload, "_key", lambda key, path: str(key))


# --- Queries ---------------------------------------------------------------------------------------------------


@caught_by(
    "test_rollouts_by_status", "test_all_attempts_of_one_rollout", "test_workers_filtered_and_in_pages"
)
def a_limit_of_zero_is_no_limit(patch: Patch) -> None:
    change_page(patch, lambda page: replace(page, limit=page.limit or -1))


@caught_by("test_rollouts_by_id", "test_spans_in_pages", "test_all_versions_of_all_ids")
def the_offset_is_ignored(patch: Patch) -> None:
    original = Page.cut
    patch.setattr(Page, "cut", lambda self, items: original(replace(self, offset=0), items))


@caught_by("test_all_attempts_of_one_rollout", "test_spans_filtered", "test_workers_filtered_and_in_pages")
def the_total_is_that_of_the_page(patch: Patch) -> None:
    original = Page.paginated
    patch.setattr(Page, "paginated", lambda self, items, total: original(self, items, len(items)))


@caught_by("test_spans_filtered", "test_workers_filtered_and_in_pages", "test_filters_of_rollouts_are_joined")
def or_means_and(patch: Patch) -> None:
    for module in (queries, reading):
        patch.setattr(module, "any_suffices", lambda filter_logic: False)


@caught_by("test_rollouts_by_status", "test_filters_of_rollouts_are_joined")
def an_empty_list_matches_everything(patch: Patch) -> None:
    original = RolloutQuery.__post_init__ if hasattr(RolloutQuery, "__post_init__") else None
    assert original is None
    patch.setattr(
        reading, "check_members", lambda values, allowed, name: frozenset(values) if values else None
    )


@caught_by(
    "test_rollouts_sorted_by_every_field",
    "test_attempts_sorted_by_every_field",
    "test_workers_sorted_by_every_field",
)
def missing_values_sort_last(patch: Patch) -> None:
    patch.setattr("lightning.store.queries.sort_key", lambda value: (value is None, value))


@caught_by("test_spans_sorted_by_every_field", "test_all_attempts_of_one_rollout")
def everything_is_sorted_upwards(patch: Patch) -> None:
    change_page(patch, lambda page: replace(page, descending=False))


@caught_by("test_queries_of_rollouts_that_mean_nothing_are_refused")
def bad_statuses_match_nothing(patch: Patch) -> None:
    patch.setattr(
        reading, "check_members", lambda values, allowed, name: None if values is None else frozenset(values)
    )


# --- Eviction --------------------------------------------------------------------------------------------------


@caught_by("test_the_first_to_finish_are_evicted")
def the_last_to_finish_are_evicted(patch: Patch) -> None:
    original = MemoryPersistence._note_evictable

    def note(self: Any, entry: Any) -> None:
        original(self, entry)
        if entry.record.rollout_id in self._evictable:
            self._evictable.move_to_end(entry.record.rollout_id, last=False)

    patch.setattr(MemoryPersistence, "_note_evictable", note)


@caught_by("test_spans_of_unfinished_rollouts_are_never_evicted")
def whatever_has_spans_is_evicted(patch: Patch) -> None:
    def note(self: Any, entry: Any) -> None:
        if entry.spans is not None:
            self._evictable.setdefault(entry.record.rollout_id, entry)

    patch.setattr(MemoryPersistence, "_note_evictable", note)


@caught_by(
    "test_evicted_spans_are_an_error_that_says_what_to_do", "test_what_came_after_an_eviction_is_there"
)
def evicted_spans_are_just_missing(patch: Patch) -> None:
    async def find(self: Any, rollout_id: str, attempt_ids: Any) -> Any:
        spans = self._rollouts[rollout_id].spans
        return [] if spans is None else [span for a in attempt_ids for span in spans.of(a)]

    patch.setattr(MemoryPersistence, "find_spans", find)


@caught_by("test_span_bytes_are_accounted_for", "test_eviction_goes_down_to_the_safe_threshold")
def nothing_is_ever_too_much(patch: Patch) -> None:
    original = MemoryPersistence._keep

    def keep(self: Any, entry: Any, attempt_id: str, spans: Any) -> None:
        original(self, entry, attempt_id, spans)
        self._span_bytes = 0

    patch.setattr(MemoryPersistence, "_keep", keep)
