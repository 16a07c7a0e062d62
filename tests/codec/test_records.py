"""Rollouts, attempts, workers, resources and what surrounds them survive the wire exactly."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightningpb.v1 import resources_pb2, rollout_pb2, span_pb2, store_service_pb2, worker_pb2
from pydantic import BaseModel

from lightning import codec
from lightning.store.contract import FilterLogic, SortOrder
from lightning.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    AttemptRef,
    AttemptStatus,
    CancelAttempt,
    Drain,
    EnqueueRolloutRequest,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    PaginatedResult,
    PromptTemplate,
    Resource,
    ResourcesChanged,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    StatusCode,
    Stop,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    WorkerStatus,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIMES = st.floats(allow_nan=False)
SECONDS = st.none() | st.floats(min_value=1e-9, max_value=1e12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.none() | st.dictionaries(TEXT, JSON, max_size=3)
ATTEMPT_STATUSES: Any = st.sampled_from(get_args(AttemptStatus))
CONFIGS = st.builds(
    RolloutConfig,
    timeout_seconds=SECONDS,
    unresponsive_seconds=SECONDS,
    max_attempts=st.integers(1, 2**32 - 1),
    retry_condition=st.lists(ATTEMPT_STATUSES, max_size=3),
)
ATTEMPTS = st.builds(
    Attempt,
    rollout_id=TEXT,
    attempt_id=TEXT,
    sequence_id=st.integers(0, 2**32 - 1),
    start_time=TIMES,
    end_time=st.none() | TIMES,
    status=ATTEMPT_STATUSES,
    worker_id=st.none() | TEXT,
    last_heartbeat_time=st.none() | TIMES,
    metadata=OBJECTS,
)
ROLLOUT_FIELDS: dict[str, Any] = {
    "rollout_id": TEXT,
    "input": JSON,
    "start_time": TIMES,
    "end_time": st.none() | TIMES,
    "mode": st.none() | st.sampled_from(get_args(RolloutMode)),
    "resources_id": st.none() | TEXT,
    "status": st.sampled_from(get_args(RolloutStatus)),
    "config": CONFIGS,
    "metadata": OBJECTS,
}
WORKERS = st.builds(
    Worker,
    worker_id=TEXT,
    status=st.sampled_from(get_args(WorkerStatus)),
    heartbeat_stats=OBJECTS,
    last_heartbeat_time=st.none() | TIMES,
    last_dequeue_time=st.none() | TIMES,
    last_busy_time=st.none() | TIMES,
    last_idle_time=st.none() | TIMES,
    current_rollout_id=st.none() | TEXT,
    current_attempt_id=st.none() | TEXT,
)
HEARTBEATS = st.builds(
    WorkerHeartbeat,
    worker_id=TEXT,
    instance_id=TEXT,
    attempts=st.lists(st.builds(AttemptRef, rollout_id=TEXT, attempt_id=TEXT), max_size=3),
    heartbeat_stats=OBJECTS,
    silent_after_seconds=SECONDS,
)
COMMANDS: st.SearchStrategy[WorkerCommand] = st.one_of(
    st.builds(CancelAttempt, rollout_id=TEXT, attempt_id=TEXT, status=ATTEMPT_STATUSES),
    st.builds(Drain, reason=TEXT),
    st.builds(Stop, reason=TEXT),
    st.builds(ResourcesChanged, resources_id=TEXT, version=st.integers(0, 2**32 - 1)),
)


def assert_same(back: BaseModel, record: BaseModel) -> None:
    """Equal, of the same class, with the same types all through, and valid."""
    assert type(back) is type(record)
    assert repr(back) == repr(record)  # tells 1 from 1.0 and True, which == does not
    assert back == record
    assert type(back).model_validate(back.model_dump()) == record


@given(st.builds(Rollout, **ROLLOUT_FIELDS))
def test_rollouts(rollout: Rollout) -> None:
    data = codec.rollout_to_proto(rollout).SerializeToString()
    assert_same(codec.rollout_from_proto(rollout_pb2.Rollout.FromString(data)), rollout)


@given(st.builds(AttemptedRollout, **ROLLOUT_FIELDS, attempt=ATTEMPTS))
def test_attempted_rollouts(rollout: AttemptedRollout) -> None:
    data = codec.rollout_to_proto(rollout).SerializeToString()
    message = rollout_pb2.Rollout.FromString(data)
    assert_same(codec.rollout_from_proto(message), rollout)
    assert_same(codec.attempted_rollout_from_proto(message), rollout)


@given(ATTEMPTS)
def test_attempts(attempt: Attempt) -> None:
    assert_same(codec.attempt_from_proto(codec.attempt_to_proto(attempt)), attempt)


@given(
    st.builds(
        EnqueueRolloutRequest, input=JSON, config=st.none() | CONFIGS, metadata=OBJECTS, mode=st.just("val")
    )
)
def test_specs(request: EnqueueRolloutRequest) -> None:
    assert_same(codec.spec_from_proto(codec.spec_to_proto(request)), request)


@given(WORKERS)
def test_workers(worker: Worker) -> None:
    assert_same(codec.worker_from_proto(codec.worker_to_proto(worker)), worker)


@given(HEARTBEATS)
def test_heartbeats(heartbeat: WorkerHeartbeat) -> None:
    assert_same(codec.heartbeat_from_proto(codec.heartbeat_to_proto(heartbeat)), heartbeat)


@given(COMMANDS)
def test_commands(command: WorkerCommand) -> None:
    back = codec.command_from_proto(codec.command_to_proto(command))
    assert back is not None
    assert_same(back, command)


def test_a_command_of_a_newer_release_is_none() -> None:
    assert codec.command_from_proto(worker_pb2.WorkerCommand()) is None


def test_what_is_no_command_is_refused() -> None:
    with pytest.raises(TypeError, match="str is not a worker command"):
        codec.command_to_proto("stop")  # type: ignore[arg-type]


def test_a_rollout_that_should_have_an_attempt_must_have_one() -> None:
    message = codec.rollout_to_proto(Rollout(rollout_id="ro-1", input=None, start_time=0.0))
    with pytest.raises(ValueError, match="rollout 'ro-1' came without its attempt"):
        codec.attempted_rollout_from_proto(message)


# --- Enums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words", "enum"),
    [
        (codec.ROLLOUT_STATUS, RolloutStatus, rollout_pb2.RolloutStatus),
        (codec.ATTEMPT_STATUS, AttemptStatus, rollout_pb2.AttemptStatus),
        (codec.ROLLOUT_MODE, RolloutMode, rollout_pb2.RolloutMode),
        (codec.WORKER_STATUS, WorkerStatus, worker_pb2.WorkerStatus),
        (codec.SPAN_STATUS_CODE, StatusCode, span_pb2.StatusCode),
        (codec.FILTER_LOGIC, FilterLogic, store_service_pb2.FilterLogic),
        (codec.SORT_ORDER, SortOrder, store_service_pb2.SortOrder),
    ],
)
def test_every_word_has_a_number_and_every_number_a_word(table: Any, words: Any, enum: Any) -> None:
    numbers = {table.to_number(word, "field") for word in get_args(words)}
    assert numbers == set(enum.values()) - {0}
    assert {table.to_word(number, "field") for number in numbers} == set(get_args(words))


def test_bad_words_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="Rollout.status has the unknown enum number 99"):
        codec.rollout_from_proto(rollout_pb2.Rollout(input_json=b"1", status=99))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Rollout.status is not set"):
        codec.rollout_from_proto(rollout_pb2.Rollout(input_json=b"1"))
    with pytest.raises(ValueError, match="mode has the unknown enum number 7"):
        codec.spec_from_proto(rollout_pb2.RolloutSpec(input_json=b"1", mode=7))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RolloutConfig.retry_condition has the unknown enum number 42"):
        codec.config_from_proto(rollout_pb2.RolloutConfig(retry_condition=[42]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="status must be one of queuing, .*, not 'done'"):
        codec.ROLLOUT_STATUS.to_number("done", "status")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="status must be one of"):
        codec.ROLLOUT_STATUS.to_number(["queuing"], "status")  # type: ignore[arg-type]


# --- Payloads and configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"{", b"NaN", b"[Infinity]", b"\xff"])
def test_an_input_that_is_not_json_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="input is not valid JSON"):
        codec.spec_from_proto(rollout_pb2.RolloutSpec(input_json=payload))


def test_metadata_must_be_an_object() -> None:
    with pytest.raises(ValueError, match="metadata must be a JSON object"):
        codec.spec_from_proto(rollout_pb2.RolloutSpec(input_json=b"1", metadata_json=b"[]"))
    fields: dict[str, Any] = {"input": 1, "metadata": [1], "mode": None, "resources_id": None, "config": None}
    request = EnqueueRolloutRequest.model_construct(**fields)
    with pytest.raises(TypeError, match="metadata must be a JSON object"):
        codec.spec_to_proto(request)


def test_payloads_are_refused_by_path() -> None:
    with pytest.raises(TypeError, match=r'input\["a"\]\[1\] is a set'):
        codec.spec_to_proto(EnqueueRolloutRequest(input={"a": [0, {1}]}))
    with pytest.raises(ValueError, match=r'metadata\["a"\] is nan'):
        codec.spec_to_proto(EnqueueRolloutRequest(input=1, metadata={"a": float("nan")}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timeout_seconds": -1.0}, "RolloutConfig.timeout_seconds is -1.0"),
        ({"timeout_seconds": float("nan")}, "RolloutConfig.timeout_seconds is nan"),
        ({"unresponsive_seconds": float("inf")}, "RolloutConfig.unresponsive_seconds is inf"),
    ],
)
def test_a_config_is_checked_at_the_door(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        codec.config_from_proto(rollout_pb2.RolloutConfig(**fields))
    assert caught.type is ValueError


def test_a_config_without_max_attempts_means_one() -> None:
    assert codec.config_from_proto(rollout_pb2.RolloutConfig()) == RolloutConfig()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_heartbeat_must_say_a_sensible_silence(seconds: float) -> None:
    with pytest.raises(ValueError, match="silent_after_seconds must be positive and finite"):
        codec.heartbeat_from_proto(worker_pb2.WorkerHeartbeat(silent_after_seconds=seconds))


# --- Resources ----------------------------------------------------------------------------------------------------


class CodecTestWeights(Resource):
    resource_type: Literal["codec-test-weights"] = "codec-test-weights"
    layers: list[list[float]]


def test_resources_come_back_in_their_classes_and_order() -> None:
    update = ResourcesUpdate(
        resources_id="rs-1",
        version=3,
        create_time=1.0,
        update_time=2.0,
        resources={
            "zeta": CodecTestWeights(layers=[[1.0, 2.5], []]),
            "alpha": LLM(endpoint="http://localhost", sampling_parameters={"n": 1, "t": 1.0}),
            "mid": PromptTemplate(template="{x}"),
            "": Resource.from_fields({"resource_type": "nobody's", "deep": {"a": [1, 1.0, None]}}),
        },
    )
    message = resources_pb2.ResourcesUpdate.FromString(codec.update_to_proto(update).SerializeToString())
    back = codec.update_from_proto(message)
    assert repr(back) == repr(update)
    assert list(back.resources) == ["zeta", "alpha", "mid", ""]
    assert [type(resource) for resource in back.resources.values()] == [
        CodecTestWeights,
        LLM,
        PromptTemplate,
        Resource,
    ]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([("a", "x", b"{}"), ("a", "x", b"{}")], 'resources names "a" twice'),
        ([("a", "x", b'{"resource_type": "y"}')], "announced as 'x' but is a 'y'"),
        ([("a", "x", b"[]")], r'resources\["a"\] must be a JSON object'),
        ([("a", "", b"{}")], "needs a non-empty string as its resource_type"),
        ([("a", "llm", b"{}")], "endpoint"),
    ],
)
def test_bad_resources_are_refused(messages: list[tuple[str, str, bytes]], error: str) -> None:
    resources = [
        resources_pb2.NamedResource(name=name, resource_type=kind, value_json=value)
        for name, kind, value in messages
    ]
    with pytest.raises(ValueError, match=error):
        codec.resources_from_proto(resources)


@pytest.mark.parametrize(
    ("resources", "error"),
    [
        ([], "resources must be a dict"),
        ({1: Resource(resource_type="x")}, "resources has the key 1"),
        ({"a": {"resource_type": "x"}}, r'resources\["a"\] is a dict, not a Resource'),
    ],
)
def test_what_are_no_resources_is_refused(resources: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        codec.resources_to_proto(resources)


# --- What surrounds the records -----------------------------------------------------------------------------------


def test_pages() -> None:
    pages: list[dict[str, Any]] = [
        {"limit": -1, "offset": 0, "sort_by": None, "sort_order": "asc"},
        {"limit": 0, "offset": 7, "sort_by": "start_time", "sort_order": "desc"},
    ]
    for page in pages:
        assert codec.page_from_proto(codec.page_to_proto(**page)) == page
    assert codec.page_from_proto(store_service_pb2.Page())["limit"] == -1


def test_results() -> None:
    result: PaginatedResult[str] = PaginatedResult(items=["a", "b"], limit=2, offset=4, total=9)
    back = codec.result_from_proto(codec.page_info_to_proto(result), list(result.items))
    assert back == result
    assert list(back) == ["a", "b"]


def test_capabilities() -> None:
    capabilities = LightningStoreCapabilities(
        thread_safe=True, async_safe=False, zero_copy=False, otlp_traces=True
    )
    assert codec.capabilities_from_proto(codec.capabilities_to_proto(capabilities)) == capabilities


def test_statistics() -> None:
    statistics: Any = LightningStoreStatistics(
        name="InMemoryLightningStore",
        total_rollouts=3,
        total_attempts=0,
        uptime=1.5,
        rollouts_by_status={"queuing": 3},
        total_span_bytes=2**40,
    )
    assert codec.statistics_from_proto(codec.statistics_to_proto(statistics)) == statistics
    foreign: Any = {**statistics, "shards": [1, 2]}
    assert codec.statistics_from_proto(codec.statistics_to_proto(foreign)) == foreign


def test_every_statistic_has_a_field() -> None:
    statistics: Any = dict.fromkeys(LightningStoreStatistics.__annotations__, 1)
    statistics.update(
        name="s", rollouts_by_status={}, attempts_by_status={"failed": 2}, expired_attempts={"timeout": 1}
    )
    message = codec.statistics_to_proto(statistics)
    assert not message.HasField("extra_json")
    assert codec.statistics_from_proto(message) == statistics
