"""Partial updates: `UNSET`, `None` and a value are three different things, and stay so on the wire.

A field that is not `UNSET` is named in the request's `update_mask`; one that is named but absent is `None`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message
from lightningpb.v1 import store_service_pb2 as service_pb2

from lightning.codec.building import build, decode_object, encode_object
from lightning.codec.enums import ATTEMPT_STATUS, ROLLOUT_STATUS
from lightning.codec.rollouts import config_from_proto, config_to_proto, mode_from_proto, mode_to_proto
from lightning.types import (
    UNSET,
    AttemptStatus,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Unset,
    decode_payload,
    encode_payload,
)

RequestT = TypeVar("RequestT", service_pb2.UpdateRolloutRequest, service_pb2.UpdateAttemptRequest)
Encoder = Callable[[Any], Any]

_ROLLOUT_ENCODERS: dict[str, tuple[str, Encoder]] = {
    "input": ("input_json", lambda value: encode_payload(value, "input")),
    "mode": ("mode", mode_to_proto),
    "resources_id": ("resources_id", lambda value: value),
    "status": ("status", lambda value: ROLLOUT_STATUS.to_number(value, "status")),
    "config": ("config", config_to_proto),
    "metadata": ("metadata_json", lambda value: encode_object(value, "metadata")),
}
_ATTEMPT_ENCODERS: dict[str, tuple[str, Encoder]] = {
    "status": ("status", lambda value: ATTEMPT_STATUS.to_number(value, "status")),
    "worker_id": ("worker_id", lambda value: value),
    "last_heartbeat_time": ("last_heartbeat_time", lambda value: value),
    "metadata": ("metadata_json", lambda value: encode_object(value, "metadata")),
}

# By the field's name on the wire: the keyword of the store's method, and how the field is read where it is set.
_ROLLOUT_DECODERS: dict[str, tuple[str, Callable[[service_pb2.UpdateRolloutRequest], Any]]] = {
    "input_json": ("input", lambda request: decode_payload(request.input_json, "input")),
    "mode": ("mode", lambda request: mode_from_proto(request.mode)),
    "resources_id": ("resources_id", lambda request: request.resources_id),
    "status": ("status", lambda request: ROLLOUT_STATUS.to_word(request.status, "status")),
    "config": ("config", lambda request: config_from_proto(request.config)),
    "metadata_json": ("metadata", lambda request: decode_object(request.metadata_json, "metadata")),
}
_ATTEMPT_DECODERS: dict[str, tuple[str, Callable[[service_pb2.UpdateAttemptRequest], Any]]] = {
    "status": ("status", lambda request: ATTEMPT_STATUS.to_word(request.status, "status")),
    "worker_id": ("worker_id", lambda request: request.worker_id),
    "last_heartbeat_time": ("last_heartbeat_time", lambda request: request.last_heartbeat_time),
    "metadata_json": ("metadata", lambda request: decode_object(request.metadata_json, "metadata")),
}


def rollout_changes_to_proto(
    request_id: str,
    rollout_id: str,
    *,
    input: Any | Unset = UNSET,
    mode: RolloutMode | None | Unset = UNSET,
    resources_id: str | None | Unset = UNSET,
    status: RolloutStatus | Unset = UNSET,
    config: RolloutConfig | Unset = UNSET,
    metadata: dict[str, Any] | None | Unset = UNSET,
) -> service_pb2.UpdateRolloutRequest:
    """Encode the arguments of `LightningStore.update_rollout`.

    Raises:
        TypeError, ValueError: A value cannot be encoded; the message names the path.
    """
    changes = {
        "input": input,
        "mode": mode,
        "resources_id": resources_id,
        "status": status,
        "config": config,
        "metadata": metadata,
    }
    request = build(service_pb2.UpdateRolloutRequest, request_id=request_id, rollout_id=rollout_id)
    return _write_changes(request, changes, _ROLLOUT_ENCODERS)


def rollout_changes_from_proto(request: service_pb2.UpdateRolloutRequest) -> dict[str, Any]:
    """The keyword arguments, beside `rollout_id`, for `LightningStore.update_rollout`.

    Raises:
        ValueError: The mask names a field that cannot be changed, or a field is wrong.
    """
    return _read_changes(request, _ROLLOUT_DECODERS)


def attempt_changes_to_proto(
    request_id: str,
    rollout_id: str,
    attempt_id: str,
    *,
    status: AttemptStatus | Unset = UNSET,
    worker_id: str | None | Unset = UNSET,
    last_heartbeat_time: float | None | Unset = UNSET,
    metadata: dict[str, Any] | None | Unset = UNSET,
) -> service_pb2.UpdateAttemptRequest:
    """Encode the arguments of `LightningStore.update_attempt`. Raises as `rollout_changes_to_proto`."""
    changes = {
        "status": status,
        "worker_id": worker_id,
        "last_heartbeat_time": last_heartbeat_time,
        "metadata": metadata,
    }
    request = build(
        service_pb2.UpdateAttemptRequest, request_id=request_id, rollout_id=rollout_id, attempt_id=attempt_id
    )
    return _write_changes(request, changes, _ATTEMPT_ENCODERS)


def attempt_changes_from_proto(request: service_pb2.UpdateAttemptRequest) -> dict[str, Any]:
    """The keyword arguments, beside the two ids, for `LightningStore.update_attempt`. Raises as its counterpart."""
    return _read_changes(request, _ATTEMPT_DECODERS)


def _write_changes(
    request: RequestT, changes: dict[str, Any], encoders: dict[str, tuple[str, Encoder]]
) -> RequestT:
    for keyword, value in changes.items():
        if value is UNSET:
            continue
        field, encode = encoders[keyword]
        request.update_mask.paths.append(field)
        if value is not None:
            request.MergeFrom(build(type(request), **{field: encode(value)}))
    return request


def _read_changes(
    request: RequestT, decoders: dict[str, tuple[str, Callable[[RequestT], Any]]]
) -> dict[str, Any]:
    message: Message = request
    changes: dict[str, Any] = {}
    for field in request.update_mask.paths:
        if field not in decoders:
            raise ValueError(f"update_mask names {field!r}, which is none of {', '.join(decoders)}")
        keyword, decode = decoders[field]
        changes[keyword] = decode(request) if message.HasField(field) else None
    return changes
