"""Records as lines of JSON: what an export of a store consists of.

The first line is a header, the last one says how many there are, and each of the others is one record. Payloads stand
in them as they are, spans in the JSON form that protobuf defines for `lightningpb.v1.Span`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from google.protobuf import json_format
from lightningpb.v1 import span_pb2
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from lightning.store.records import (
    AppliedRequest,
    AttemptRecord,
    ConfigRecord,
    Lease,
    ResourcesRecord,
    RolloutRecord,
    SpanRecord,
    WorkerRecord,
)
from lightning.types import (
    AttemptStatus,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    decode_payload,
    encode_payload,
)

VERSION = 1

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)

Payload = dict[str, Any] | None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class HeaderLine(_Model):
    kind: Literal["header"] = "header"
    format: Literal["agent-lightning-store"] = "agent-lightning-store"
    version: int = VERSION


class ResourcesLine(_Model):
    kind: Literal["resources"] = "resources"
    resources_id: str
    version: int
    create_time: float
    update_time: float
    request_digest: str | None
    resources: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, record: ResourcesRecord) -> ResourcesLine:
        return cls(
            resources_id=record.resources_id,
            version=record.version,
            create_time=record.create_time,
            update_time=record.update_time,
            request_digest=record.request_digest,
            resources={name: decode_payload(fields) for name, fields in record.resources},
        )

    def to_record(self) -> ResourcesRecord:
        fields = tuple((name, encode_payload(value, name)) for name, value in self.resources.items())
        return ResourcesRecord(
            self.resources_id, self.version, self.create_time, self.update_time, fields, self.request_digest
        )


class AttemptPart(_Model):
    attempt_id: str
    sequence_id: int
    status: AttemptStatus
    start_time: float
    end_time: float | None
    worker_id: str | None
    instance_id: str | None
    last_heartbeat_time: float | None
    metadata: Payload
    last_span_sequence_id: int

    @classmethod
    def of(cls, record: AttemptRecord) -> AttemptPart:
        fields = {name: getattr(record, name) for name in cls.model_fields}
        return cls(**{**fields, "metadata": _decode(record.metadata)})

    def to_record(self) -> AttemptRecord:
        return AttemptRecord(**{**dict(self), "metadata": _encode(self.metadata, "metadata")})


class RolloutLine(_Model):
    kind: Literal["rollout"] = "rollout"
    rollout_id: str
    input: Any
    status: RolloutStatus
    start_time: float
    end_time: float | None
    mode: RolloutMode | None
    resources_id: str | None
    config: RolloutConfig
    metadata: Payload
    queue_place: int | None
    """How many rollouts stand before it in the queue; None: it is not in it."""
    applied: list[Annotated[tuple[str, int], Strict(False)]]
    """The requests that changed it last, and what came of them, oldest first."""
    attempts: list[AttemptPart]

    @classmethod
    def of(cls, record: RolloutRecord, queue_place: int | None) -> RolloutLine:
        names = ("rollout_id", "status", "start_time", "end_time", "mode", "resources_id")
        return cls(
            **{name: getattr(record, name) for name in names},
            input=decode_payload(record.input),
            config=record.config.to_config(),
            metadata=_decode(record.metadata),
            queue_place=queue_place,
            applied=[(request.request_digest, request.value) for request in record.applied],
            attempts=[AttemptPart.of(attempt) for attempt in record.attempts],
        )

    def to_record(self) -> RolloutRecord:
        names = ("rollout_id", "status", "start_time", "end_time", "mode", "resources_id")
        return RolloutRecord(
            **{name: getattr(self, name) for name in names},
            input=encode_payload(self.input, "input"),
            config=ConfigRecord.of(self.config),
            metadata=_encode(self.metadata, "metadata"),
            applied=tuple(AppliedRequest(digest, value) for digest, value in self.applied),
            attempts=tuple(attempt.to_record() for attempt in self.attempts),
        )


class SpanLine(_Model):
    """A span of the rollout whose line came last."""

    kind: Literal["span"] = "span"
    attempt_id: str
    sequence_id: int
    span: dict[str, Any]

    @classmethod
    def of(cls, record: SpanRecord) -> SpanLine:
        message = span_pb2.Span.FromString(record.payload)
        message.sequence_id = record.sequence_id  # the one in the payload does not count
        fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
        return cls(attempt_id=record.attempt_id, sequence_id=record.sequence_id, span=fields)

    def to_record(self) -> SpanRecord:
        try:
            message = json_format.ParseDict(self.span, span_pb2.Span())
        except json_format.ParseError as error:
            raise ValueError(f"span: {error}") from None
        return SpanRecord(self.attempt_id, message.span_id, self.sequence_id, message.SerializeToString())


class WorkerLine(_Model):
    kind: Literal["worker"] = "worker"
    worker_id: str
    heartbeat_stats: Payload
    last_heartbeat_time: float | None
    last_dequeue_time: float | None
    last_busy_time: float | None
    last_idle_time: float | None
    silent_after_seconds: float | None
    leases: list[Annotated[tuple[str, str, str | None], Strict(False)]]
    """Rollout, attempt and instance of each that it holds, oldest first."""

    @classmethod
    def of(cls, record: WorkerRecord) -> WorkerLine:
        fields = {name: getattr(record, name) for name in cls.model_fields if name != "kind"}
        leases = [(lease.rollout_id, lease.attempt_id, lease.instance_id) for lease in record.leases]
        return cls(**{**fields, "heartbeat_stats": _decode(record.heartbeat_stats), "leases": leases})

    def to_record(self) -> WorkerRecord:
        fields = {name: value for name, value in self if name != "kind"}
        leases = tuple(Lease(*lease) for lease in self.leases)
        stats = _encode(self.heartbeat_stats, "heartbeat_stats")
        return WorkerRecord(**{**fields, "heartbeat_stats": stats, "leases": leases})


class EndLine(_Model):
    kind: Literal["end"] = "end"
    lines: int
    """How many lines came before this one."""


Line = HeaderLine | ResourcesLine | RolloutLine | SpanLine | WorkerLine | EndLine

_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def write_line(line: Line) -> bytes:
    """One line of an export, with its end."""
    return _encoder.encode(line.model_dump()).encode("utf-8") + b"\n"


def read_line(data: bytes) -> Line:
    """Raises `ValueError`: it is no line of an export; the message says what is wrong with it."""
    value = decode_payload(data, "the line")
    try:
        return _LINE.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"{place or 'the line'}: {first['msg']}") from None


def _decode(data: bytes | None) -> Payload:
    return None if data is None else decode_payload(data)


def _encode(value: Payload, name: str) -> bytes | None:
    return None if value is None else encode_payload(value, name)
