"""Partial updates: left alone, cleared and set are told apart on the wire."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightningpb.v1 import store_service_pb2

from lightning import codec
from lightning.types import UNSET, RolloutConfig

ROLLOUT_CHANGES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "input": st.sampled_from([None, 0, 0.0, False, "", [], {}]),
        "mode": st.sampled_from([None, "train", "val"]),
        "resources_id": st.sampled_from([None, "", "rs-1"]),
        "status": st.sampled_from(["queuing", "cancelled"]),
        "config": st.sampled_from([RolloutConfig(), RolloutConfig(max_attempts=3)]),
        "metadata": st.sampled_from([None, {}, {"a": 1}]),
    },
)
ATTEMPT_CHANGES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["failed", "succeeded"]),
        "worker_id": st.sampled_from([None, "", "w-1"]),
        "last_heartbeat_time": st.sampled_from([None, 0.0, 12.5]),
        "metadata": st.sampled_from([None, {}, {"a": 1}]),
    },
)


@given(ROLLOUT_CHANGES)
def test_changes_of_a_rollout(changes: dict[str, Any]) -> None:
    data = codec.rollout_changes_to_proto("rq", "ro-1", **changes).SerializeToString()
    request = store_service_pb2.UpdateRolloutRequest.FromString(data)
    assert (request.request_id, request.rollout_id) == ("rq", "ro-1")
    assert repr(codec.rollout_changes_from_proto(request)) == repr(in_order(changes, ROLLOUT_ORDER))


@given(ATTEMPT_CHANGES)
def test_changes_of_an_attempt(changes: dict[str, Any]) -> None:
    data = codec.attempt_changes_to_proto("rq", "ro-1", "latest", **changes).SerializeToString()
    request = store_service_pb2.UpdateAttemptRequest.FromString(data)
    assert (request.request_id, request.rollout_id, request.attempt_id) == ("rq", "ro-1", "latest")
    assert repr(codec.attempt_changes_from_proto(request)) == repr(in_order(changes, ATTEMPT_ORDER))


ROLLOUT_ORDER = ("input", "mode", "resources_id", "status", "config", "metadata")
ATTEMPT_ORDER = ("status", "worker_id", "last_heartbeat_time", "metadata")


def in_order(changes: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: changes[key] for key in keys if key in changes}


def test_what_is_left_alone_is_not_sent() -> None:
    request = codec.rollout_changes_to_proto("rq", "ro-1", input=UNSET, status=UNSET)
    assert request == store_service_pb2.UpdateRolloutRequest(request_id="rq", rollout_id="ro-1")


def test_a_field_that_the_mask_does_not_name_is_left_alone_whatever_it_holds() -> None:
    request = store_service_pb2.UpdateRolloutRequest(resources_id="rs-1")
    assert codec.rollout_changes_from_proto(request) == {}


def test_a_mask_may_name_only_what_can_be_changed() -> None:
    request = store_service_pb2.UpdateRolloutRequest()
    request.update_mask.paths.append("rollout_id")
    with pytest.raises(ValueError, match="update_mask names 'rollout_id', which is none of input_json, mode"):
        codec.rollout_changes_from_proto(request)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="status must be one of .*, not 'done'"):
        codec.attempt_changes_to_proto("rq", "ro-1", "at-1", status="done")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="UpdateAttemptRequest.last_heartbeat_time cannot be a str"):
        codec.attempt_changes_to_proto("rq", "ro-1", "at-1", last_heartbeat_time="now")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'input\["a"\] is a set'):
        codec.rollout_changes_to_proto("rq", "ro-1", input={"a": {1}})
