"""Rollouts, attempts and what new rollouts are made of, to messages and back."""

from __future__ import annotations

from typing import Any

from lightningpb.v1 import rollout_pb2

from lightning.codec.building import build, construct, decode_object, encode_object
from lightning.codec.enums import ATTEMPT_STATUS, ROLLOUT_MODE, ROLLOUT_STATUS
from lightning.types import (
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    RolloutMode,
    decode_payload,
    encode_payload,
)


def config_to_proto(config: RolloutConfig) -> rollout_pb2.RolloutConfig:
    """Encode a rollout's config. Raises `TypeError` if it is none, and as `build` for a bad field."""
    if not isinstance(config, RolloutConfig):
        raise TypeError(f"config must be a RolloutConfig, not {type(config).__name__}")
    if config.max_attempts == 0:  # on the wire, 0 is the default and read as 1
        raise ValueError("config.max_attempts must be at least 1, not 0")
    return build(
        rollout_pb2.RolloutConfig,
        timeout_seconds=config.timeout_seconds,
        unresponsive_seconds=config.unresponsive_seconds,
        max_attempts=config.max_attempts,
        retry_condition=[
            ATTEMPT_STATUS.to_number(status, "config.retry_condition") for status in config.retry_condition
        ],
    )


def config_from_proto(message: rollout_pb2.RolloutConfig) -> RolloutConfig:
    """Decode and check a rollout's config. Raises `ValueError` naming the field that is wrong."""
    timeout = message.timeout_seconds if message.HasField("timeout_seconds") else None
    unresponsive = message.unresponsive_seconds if message.HasField("unresponsive_seconds") else None
    fields = {
        "timeout_seconds": timeout,
        "unresponsive_seconds": unresponsive,
        "max_attempts": message.max_attempts or 1,
        "retry_condition": [
            ATTEMPT_STATUS.to_word(status, "RolloutConfig.retry_condition")
            for status in message.retry_condition
        ],
    }
    if timeout is None and unresponsive is None:  # nothing else could be wrong, and most have no limits
        return construct(RolloutConfig, fields)
    return RolloutConfig.checked(fields)


def mode_to_proto(mode: RolloutMode | None) -> rollout_pb2.RolloutMode.ValueType:
    """The mode's number; None is `UNSPECIFIED`. Raises `ValueError` for an unknown mode."""
    return rollout_pb2.ROLLOUT_MODE_UNSPECIFIED if mode is None else ROLLOUT_MODE.to_number(mode, "mode")


def mode_from_proto(number: rollout_pb2.RolloutMode.ValueType) -> RolloutMode | None:
    """The mode; None for `UNSPECIFIED`. Raises `ValueError` for an unknown number."""
    return None if number == rollout_pb2.ROLLOUT_MODE_UNSPECIFIED else ROLLOUT_MODE.to_word(number, "mode")


def attempt_to_proto(attempt: Attempt) -> rollout_pb2.Attempt:
    """Encode an attempt. Raises `TypeError` or `ValueError` for a field that cannot be encoded."""
    return build(
        rollout_pb2.Attempt,
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        sequence_id=attempt.sequence_id,
        start_time=attempt.start_time,
        end_time=attempt.end_time,
        status=ATTEMPT_STATUS.to_number(attempt.status, "attempt.status"),
        worker_id=attempt.worker_id,
        last_heartbeat_time=attempt.last_heartbeat_time,
        metadata_json=encode_object(attempt.metadata, "attempt.metadata"),
    )


def attempt_from_proto(message: rollout_pb2.Attempt) -> Attempt:
    """Decode an attempt. Raises `ValueError` for an unknown status or metadata that is no JSON object."""
    has = message.HasField
    return construct(
        Attempt,
        {
            "rollout_id": message.rollout_id,
            "attempt_id": message.attempt_id,
            "sequence_id": message.sequence_id,
            "start_time": message.start_time,
            "end_time": message.end_time if has("end_time") else None,
            "status": ATTEMPT_STATUS.to_word(message.status, "Attempt.status"),
            "worker_id": message.worker_id if has("worker_id") else None,
            "last_heartbeat_time": message.last_heartbeat_time if has("last_heartbeat_time") else None,
            "metadata": decode_object(message.metadata_json, "metadata") if has("metadata_json") else None,
        },
    )


def rollout_to_proto(rollout: Rollout) -> rollout_pb2.Rollout:
    """Encode a rollout, an `AttemptedRollout` with its attempt.

    Raises:
        TypeError, ValueError: A field cannot be encoded; the message names the path.
    """
    return build(
        rollout_pb2.Rollout,
        rollout_id=rollout.rollout_id,
        input_json=encode_payload(rollout.input, "input"),
        start_time=rollout.start_time,
        end_time=rollout.end_time,
        mode=mode_to_proto(rollout.mode),
        resources_id=rollout.resources_id,
        status=ROLLOUT_STATUS.to_number(rollout.status, "status"),
        config=config_to_proto(rollout.config),
        metadata_json=encode_object(rollout.metadata, "metadata"),
        latest_attempt=attempt_to_proto(rollout.attempt) if isinstance(rollout, AttemptedRollout) else None,
    )


def rollout_from_proto(message: rollout_pb2.Rollout) -> Rollout:
    """Decode a rollout; with `latest_attempt` set it is an `AttemptedRollout`.

    Raises:
        ValueError: An unknown status or mode, or a payload that is not JSON.
    """
    if message.HasField("latest_attempt"):
        return attempted_rollout_from_proto(message)
    return construct(Rollout, _rollout_fields(message))


def attempted_rollout_from_proto(message: rollout_pb2.Rollout) -> AttemptedRollout:
    """Decode a rollout that has an attempt. Raises `ValueError` if it has none, and as `rollout_from_proto`."""
    if not message.HasField("latest_attempt"):
        raise ValueError(f"rollout {message.rollout_id!r} came without its attempt")
    fields = _rollout_fields(message)
    fields["attempt"] = attempt_from_proto(message.latest_attempt)
    return construct(AttemptedRollout, fields)


def _rollout_fields(message: rollout_pb2.Rollout) -> dict[str, Any]:
    has = message.HasField
    return {
        "rollout_id": message.rollout_id,
        "input": decode_payload(message.input_json, "input"),
        "start_time": message.start_time,
        "end_time": message.end_time if has("end_time") else None,
        "mode": mode_from_proto(message.mode),
        "resources_id": message.resources_id if has("resources_id") else None,
        "status": ROLLOUT_STATUS.to_word(message.status, "Rollout.status"),
        "config": config_from_proto(message.config),
        "metadata": decode_object(message.metadata_json, "metadata") if has("metadata_json") else None,
    }


def spec_to_proto(request: EnqueueRolloutRequest) -> rollout_pb2.RolloutSpec:
    """Encode what a new rollout is made of.

    Raises:
        TypeError, ValueError: A field cannot be encoded; the message names the path.
    """
    return build(
        rollout_pb2.RolloutSpec,
        input_json=encode_payload(request.input, "input"),
        mode=mode_to_proto(request.mode),
        resources_id=request.resources_id,
        config=None if request.config is None else config_to_proto(request.config),
        metadata_json=encode_object(request.metadata, "metadata"),
    )


def spec_from_proto(message: rollout_pb2.RolloutSpec) -> EnqueueRolloutRequest:
    """Decode what a new rollout is made of.

    Raises:
        ValueError: A payload is not JSON, or a field is wrong.
    """
    metadata = message.metadata_json if message.HasField("metadata_json") else None
    return construct(
        EnqueueRolloutRequest,
        {
            "input": decode_payload(message.input_json, "input"),
            "mode": mode_from_proto(message.mode),
            "resources_id": message.resources_id if message.HasField("resources_id") else None,
            "config": config_from_proto(message.config) if message.HasField("config") else None,
            "metadata": None if metadata is None else decode_object(metadata, "metadata"),
        },
    )
