"""Records as the store keeps them: immutable, payloads encoded, one per unit of atomicity.

The rollout is that unit: a `RolloutRecord` holds its attempts, so that every rule of the lifecycle is a function from
one record to the next, and every backend makes a change true by replacing one record.

What changes all the time is a tuple, which is made, and made anew with a change, several times as fast as a frozen
dataclass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightningpb.v1 import span_pb2

from lightning.codec.building import construct
from lightning.codec.spans import decode_span, encode_span, parse_span, renumber_span
from lightning.types import (
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Resource,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    Worker,
    WorkerStatus,
    decode_payload,
    encode_payload,
)


@dataclass(frozen=True)
class ConfigRecord:
    """`RolloutConfig`, immutable and shared: rollouts by the million have few different ones."""

    timeout_seconds: float | None
    unresponsive_seconds: float | None
    max_attempts: int
    retry_condition: tuple[AttemptStatus, ...]

    @classmethod
    def of(cls, config: RolloutConfig | None) -> ConfigRecord:
        """Raises `ValueError` if the fields were set to something invalid after the config was made."""
        if config is None:
            return _intern_config(None, None, 1, ())
        checked = RolloutConfig.checked(config.model_dump())
        return _intern_config(
            checked.timeout_seconds,
            checked.unresponsive_seconds,
            checked.max_attempts,
            tuple(checked.retry_condition),
        )

    def to_config(self) -> RolloutConfig:
        """A fresh `RolloutConfig`."""
        return construct(
            RolloutConfig,
            {
                "timeout_seconds": self.timeout_seconds,
                "unresponsive_seconds": self.unresponsive_seconds,
                "max_attempts": self.max_attempts,
                "retry_condition": list(self.retry_condition),
            },
        )


@functools.lru_cache(maxsize=1024)
def _intern_config(
    timeout_seconds: float | None,
    unresponsive_seconds: float | None,
    max_attempts: int,
    retry_condition: tuple[AttemptStatus, ...],
) -> ConfigRecord:
    return ConfigRecord(timeout_seconds, unresponsive_seconds, max_attempts, retry_condition)


class AttemptRecord(NamedTuple):
    """`Attempt` less its rollout id, plus what only the store needs."""

    attempt_id: str
    sequence_id: int
    status: AttemptStatus
    start_time: float
    end_time: float | None = None
    worker_id: str | None = None
    instance_id: str | None = None
    """The worker process that claimed it; None when it was claimed without naming one."""
    last_heartbeat_time: float | None = None
    metadata: bytes | None = None
    last_span_sequence_id: int = 0
    """Highest sequence id given to a span of this attempt."""

    def to_attempt(self, rollout_id: str) -> Attempt:
        """A fresh `Attempt`."""
        return construct(
            Attempt,
            {
                "rollout_id": rollout_id,
                "attempt_id": self.attempt_id,
                "sequence_id": self.sequence_id,
                "start_time": self.start_time,
                "end_time": self.end_time,
                "status": self.status,
                "worker_id": self.worker_id,
                "last_heartbeat_time": self.last_heartbeat_time,
                "metadata": _decode_optional(self.metadata),
            },
        )


class AppliedRequest(NamedTuple):
    """A request that changed a record; see `lightning.store.idempotency`."""

    request_digest: str
    value: int


class RolloutRecord(NamedTuple):
    """`Rollout` with its attempts."""

    rollout_id: str
    input: bytes
    status: RolloutStatus
    start_time: float
    config: ConfigRecord
    mode: RolloutMode | None = None
    resources_id: str | None = None
    metadata: bytes | None = None
    end_time: float | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    applied: tuple[AppliedRequest, ...] = ()
    """The requests that changed it last, oldest first."""
    revision: int = 0
    """Set by the persistence at every change, from one counter for all rollouts: later changes have higher ones."""

    @property
    def latest_attempt(self) -> AttemptRecord | None:
        """The attempt with the highest sequence id."""
        return self.attempts[-1] if self.attempts else None

    def find_attempt(self, attempt_id: str) -> AttemptRecord | None:
        """The attempt with this id; `"latest"` is the newest one."""
        if attempt_id == "latest":
            return self.latest_attempt
        for attempt in reversed(self.attempts):
            if attempt.attempt_id == attempt_id:
                return attempt
        return None

    def to_rollout(self) -> Rollout:
        """A fresh `Rollout`, or `AttemptedRollout` with the latest attempt if there are any."""
        latest = self.latest_attempt
        if latest is None:
            return construct(Rollout, self._fields_of_rollout())
        return self.to_attempted_rollout(latest)

    def to_attempted_rollout(self, attempt: AttemptRecord) -> AttemptedRollout:
        """A fresh `AttemptedRollout` with one of its attempts."""
        fields = self._fields_of_rollout()
        fields["attempt"] = attempt.to_attempt(self.rollout_id)
        return construct(AttemptedRollout, fields)

    def _fields_of_rollout(self) -> dict[str, Any]:
        return {
            "rollout_id": self.rollout_id,
            "input": decode_payload(self.input),
            "start_time": self.start_time,
            "end_time": self.end_time,
            "mode": self.mode,
            "resources_id": self.resources_id,
            "status": self.status,
            "config": self.config.to_config(),
            "metadata": _decode_optional(self.metadata),
        }


class SpanRecord(NamedTuple):
    """One stored span."""

    attempt_id: str
    span_id: str
    sequence_id: int
    """0 in a record that has not been stored yet: number it on arrival."""
    payload: bytes
    """The span as an encoded `lightningpb.v1.Span`; its own `sequence_id` field does not count, the one here does."""

    @classmethod
    def of(cls, span: Span) -> SpanRecord:
        """Check and encode a span. Raises `TypeError` or `ValueError` naming what cannot be stored."""
        return cls(span.attempt_id, span.span_id, span.sequence_id, encode_span(span))

    def to_message(self) -> span_pb2.Span:
        """A fresh message, with the number that the span has here."""
        return parse_span(self.payload, self.sequence_id)

    def to_bytes(self) -> bytes:
        """`to_message`, encoded."""
        return renumber_span(self.payload, self.sequence_id)

    def to_span(self) -> Span:
        """A fresh `Span`."""
        return decode_span(self.payload, self.sequence_id)


class SpanReceipt(NamedTuple):
    """What became of a span that was handed in."""

    sequence_id: int
    """The one it has; 0 for a duplicate."""
    stored: bool
    """False: the attempt had a span with this id already, this one was skipped."""


class Lease(NamedTuple):
    """An open attempt that a worker holds."""

    rollout_id: str
    attempt_id: str
    instance_id: str | None


class WorkerRecord(NamedTuple):
    """`Worker` with all the attempts it holds."""

    worker_id: str
    heartbeat_stats: bytes | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    silent_after_seconds: float | None = None
    leases: tuple[Lease, ...] = ()
    """Oldest first."""

    def to_worker(self, status: WorkerStatus) -> Worker:
        """A fresh `Worker`; what its status is now is the lifecycle's to say."""
        current = self.leases[-1] if self.leases else None
        return construct(
            Worker,
            {
                "worker_id": self.worker_id,
                "status": status,
                "heartbeat_stats": _decode_optional(self.heartbeat_stats),
                "last_heartbeat_time": self.last_heartbeat_time,
                "last_dequeue_time": self.last_dequeue_time,
                "last_busy_time": self.last_busy_time,
                "last_idle_time": self.last_idle_time,
                "current_rollout_id": current.rollout_id if current else None,
                "current_attempt_id": current.attempt_id if current else None,
            },
        )


@dataclass(frozen=True, slots=True)
class ResourcesRecord:
    """`ResourcesUpdate`, each resource encoded."""

    resources_id: str
    version: int
    create_time: float
    update_time: float
    resources: tuple[tuple[str, bytes], ...]
    """`(name, JSON object with all fields)`, in the user's order."""
    request_digest: str | None = None
    """The request that published it; see `lightning.store.idempotency`."""

    def to_update(self) -> ResourcesUpdate:
        """A fresh `ResourcesUpdate`, each resource of the class registered for its type."""
        return construct(
            ResourcesUpdate,
            {
                "resources_id": self.resources_id,
                "create_time": self.create_time,
                "update_time": self.update_time,
                "version": self.version,
                "resources": {
                    name: Resource.from_fields(decode_payload(data)) for name, data in self.resources
                },
            },
        )


def encode_resources(resources: dict[str, Resource]) -> tuple[tuple[str, bytes], ...]:
    """Check and encode named resources.

    Raises:
        TypeError: A name is not a string, or a value not a `Resource`.
        ValueError: A field holds what JSON cannot.
    """
    if not isinstance(resources, dict):
        raise TypeError(
            f"resources must be a dict of names to Resource objects, not {type(resources).__name__}"
        )
    encoded: list[tuple[str, bytes]] = []
    for name, resource in resources.items():
        if not isinstance(name, str):
            raise TypeError(f"resources has the key {name!r}; names must be strings")
        if not isinstance(resource, Resource):
            raise TypeError(f'resources["{name}"] is a {type(resource).__name__}, not a Resource')
        encoded.append((name, encode_payload(resource.model_dump(mode="json"), f'resources["{name}"]')))
    return tuple(encoded)


def encode_metadata(metadata: dict[str, object] | None, name: str = "metadata") -> bytes | None:
    """Check and encode a JSON object or None. Raises `TypeError` for anything else, and as `encode_payload` does."""
    if metadata is None:
        return None
    data = encode_payload(metadata, name)
    if not data.startswith(b"{"):
        raise TypeError(f"{name} must be a JSON object (a dict), not {type(metadata).__name__}")
    return data


def _decode_optional(data: bytes | None) -> dict[str, object] | None:
    return None if data is None else decode_payload(data)
