"""Workers, their heartbeats and commands, to messages and back."""

from __future__ import annotations

from lightningpb.v1 import worker_pb2

from lightning.codec.building import build, construct, decode_object, encode_object
from lightning.codec.enums import ATTEMPT_STATUS, WORKER_STATUS
from lightning.types import (
    AttemptRef,
    CancelAttempt,
    Drain,
    ResourcesChanged,
    Stop,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
)


def worker_to_proto(worker: Worker) -> worker_pb2.Worker:
    """Encode a worker. Raises `TypeError` or `ValueError` for a field that cannot be encoded."""
    return build(
        worker_pb2.Worker,
        worker_id=worker.worker_id,
        status=WORKER_STATUS.to_number(worker.status, "worker.status"),
        heartbeat_stats_json=encode_object(worker.heartbeat_stats, "heartbeat_stats"),
        last_heartbeat_time=worker.last_heartbeat_time,
        last_dequeue_time=worker.last_dequeue_time,
        last_busy_time=worker.last_busy_time,
        last_idle_time=worker.last_idle_time,
        current_rollout_id=worker.current_rollout_id,
        current_attempt_id=worker.current_attempt_id,
    )


def worker_from_proto(message: worker_pb2.Worker) -> Worker:
    """Decode a worker. Raises `ValueError` for an unknown status or stats that are no JSON object."""
    has = message.HasField
    stats = message.heartbeat_stats_json if has("heartbeat_stats_json") else None
    return construct(
        Worker,
        {
            "worker_id": message.worker_id,
            "status": WORKER_STATUS.to_word(message.status, "Worker.status"),
            "heartbeat_stats": None if stats is None else decode_object(stats, "heartbeat_stats"),
            "last_heartbeat_time": message.last_heartbeat_time if has("last_heartbeat_time") else None,
            "last_dequeue_time": message.last_dequeue_time if has("last_dequeue_time") else None,
            "last_busy_time": message.last_busy_time if has("last_busy_time") else None,
            "last_idle_time": message.last_idle_time if has("last_idle_time") else None,
            "current_rollout_id": message.current_rollout_id if has("current_rollout_id") else None,
            "current_attempt_id": message.current_attempt_id if has("current_attempt_id") else None,
        },
    )


def heartbeat_to_proto(heartbeat: WorkerHeartbeat) -> worker_pb2.WorkerHeartbeat:
    """Encode a heartbeat. Raises `TypeError` or `ValueError` for a field that cannot be encoded."""
    return build(
        worker_pb2.WorkerHeartbeat,
        worker_id=heartbeat.worker_id,
        instance_id=heartbeat.instance_id,
        attempts=[
            build(worker_pb2.AttemptRef, rollout_id=ref.rollout_id, attempt_id=ref.attempt_id)
            for ref in heartbeat.attempts
        ],
        heartbeat_stats_json=encode_object(heartbeat.heartbeat_stats, "heartbeat_stats"),
        silent_after_seconds=heartbeat.silent_after_seconds,
    )


def heartbeat_from_proto(message: worker_pb2.WorkerHeartbeat) -> WorkerHeartbeat:
    """Decode a heartbeat.

    Raises:
        ValueError: Stats that are no JSON object, or a `silent_after_seconds` that is not a positive, finite number.
    """
    silent_after = message.silent_after_seconds if message.HasField("silent_after_seconds") else None
    if silent_after is not None and not 0 < silent_after < float("inf"):
        raise ValueError(
            f"WorkerHeartbeat.silent_after_seconds must be positive and finite, not {silent_after}"
        )
    stats = message.heartbeat_stats_json if message.HasField("heartbeat_stats_json") else None
    return construct(
        WorkerHeartbeat,
        {
            "worker_id": message.worker_id,
            "instance_id": message.instance_id,
            "attempts": [
                construct(AttemptRef, {"rollout_id": ref.rollout_id, "attempt_id": ref.attempt_id})
                for ref in message.attempts
            ],
            "heartbeat_stats": None if stats is None else decode_object(stats, "heartbeat_stats"),
            "silent_after_seconds": silent_after,
        },
    )


def command_to_proto(command: WorkerCommand) -> worker_pb2.WorkerCommand:
    """Encode a command. Raises `TypeError` if it is none, and `ValueError` for a field that cannot be encoded."""
    kinds = worker_pb2.WorkerCommand
    if isinstance(command, CancelAttempt):
        cancel = build(
            kinds.CancelAttempt,
            rollout_id=command.rollout_id,
            attempt_id=command.attempt_id,
            status=ATTEMPT_STATUS.to_number(command.status, "command.status"),
        )
        return kinds(cancel_attempt=cancel)
    if isinstance(command, Drain):
        return kinds(drain=build(kinds.Drain, reason=command.reason))
    if isinstance(command, Stop):
        return kinds(stop=build(kinds.Stop, reason=command.reason))
    if isinstance(command, ResourcesChanged):
        changed = build(kinds.ResourcesChanged, resources_id=command.resources_id, version=command.version)
        return kinds(resources_changed=changed)
    raise TypeError(f"{type(command).__name__} is not a worker command")


def command_from_proto(message: worker_pb2.WorkerCommand) -> WorkerCommand | None:
    """Decode a command; None for one that only newer releases know, which a worker ignores.

    Raises:
        ValueError: An unknown status.
    """
    kind = message.WhichOneof("command")
    if kind == "cancel_attempt":
        cancel = message.cancel_attempt
        return CancelAttempt(
            rollout_id=cancel.rollout_id,
            attempt_id=cancel.attempt_id,
            status=ATTEMPT_STATUS.to_word(cancel.status, "CancelAttempt.status"),
        )
    if kind == "drain":
        return Drain(reason=message.drain.reason)
    if kind == "stop":
        return Stop(reason=message.stop.reason)
    if kind == "resources_changed":
        changed = message.resources_changed
        return ResourcesChanged(resources_id=changed.resources_id, version=changed.version)
    return None
