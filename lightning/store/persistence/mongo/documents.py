"""Records as MongoDB documents, and back.

Payloads rest as bytes, so nothing in them (dots, dollars, NUL characters) means anything to MongoDB. Numbers that order
things (`ordinal`, `queue`, `finished`, `revision`) are timestamps of the database's own logical clock: unique, rising,
and the same for all servers.
"""

from __future__ import annotations

import functools
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import count, pairwise
from typing import Any, Protocol, TypeVar

from bson import ObjectId, Timestamp

from lightning.store import lifecycle
from lightning.store.persistence.mongo.connection import Document
from lightning.store.records import (
    AppliedRequest,
    AttemptRecord,
    ConfigRecord,
    Lease,
    ResourcesRecord,
    RolloutRecord,
    WorkerRecord,
)
from lightning.types import AttemptStatus

INLINE_BYTES = 64 * 1024
"""A larger payload does not rest in the document but beside it, in chunks."""
INLINE_PER_ATTEMPT_BYTES = 4 * 1024
"""The same, for the payload of one of maybe thousands of attempts that share a document."""

NEXT = Timestamp(0, 0)
"""In a new document, MongoDB replaces it by the time on its logical clock."""
_TICK = {"$type": "timestamp"}

_REMEMBERED_CHANGES = 16
_SMALL_BYTES = 4096
_EPOCH_SECONDS = 1_704_067_200
"""Revisions count from the start of 2024, so that they fit 63 bits for the rest of this century."""

RecordT = TypeVar("RecordT")


class ChangeTokens:
    """Ids for changes, which tell whether a change whose outcome is unknown was made, and by which server.

    They rise, and all those of one object lie between `first` and `last`.
    """

    def __init__(self) -> None:
        self._writer = os.urandom(8)
        self._numbers = count()
        self.first = ObjectId(self._writer + b"\x00\x00\x00\x00")
        self.last = ObjectId(self._writer + b"\xff\xff\xff\xff")

    def next(self) -> ObjectId:
        """One that was never used."""
        return ObjectId(self._writer + struct.pack(">I", next(self._numbers) & 0xFFFFFFFF))


@dataclass
class Spill:
    """The payloads of one write that are too large to rest in the document, and those that the write makes obsolete."""

    added: dict[ObjectId, bytes] = field(default_factory=dict)
    written: set[ObjectId] = field(default_factory=set)
    replaced: set[tuple[ObjectId, int]] = field(default_factory=set)
    """With their sizes."""
    _placed: dict[bytes, Document] = field(default_factory=dict)

    def place(self, data: bytes | None, inline_bytes: int = INLINE_BYTES) -> bytes | Document | None:
        """What to put into the document for this payload."""
        if data is None or len(data) <= inline_bytes:
            return data
        if data not in self._placed:
            payload_id = ObjectId()
            self.added[payload_id] = data
            self._placed[data] = {"payload": payload_id, "size": len(data)}
        return self._placed[data]

    def replace(
        self, old: bytes | Document | None, data: bytes | None, inline_bytes: int = INLINE_BYTES
    ) -> bytes | Document | None:
        """The same, for one that takes the place of `old`."""
        if isinstance(old, dict):
            self.replaced.add((old["payload"], old["size"]))
        return self.place(data, inline_bytes)


Contents = Mapping[ObjectId, bytes]
"""Payloads that rest beside a document, by id."""


def references(value: Any) -> dict[ObjectId, int]:
    """The payloads beside a document that it refers to, with their sizes."""
    found: dict[ObjectId, int] = {}
    if isinstance(value, dict):
        if "payload" in value:
            return {value["payload"]: value["size"]}
        value = value.values()
    elif not isinstance(value, list):
        return found
    for part in value:
        if isinstance(part, (dict, list)):
            found.update(references(part))
    return found


def content(stored: Any, contents: Contents) -> Any:
    """The payload for which `Spill.place` put `stored` into a document."""
    return contents[stored["payload"]] if isinstance(stored, dict) else stored


def number(timestamp: Timestamp) -> int:
    """A time of the logical clock as a number, in the same order."""
    return ((timestamp.time - _EPOCH_SECONDS) << 32) | timestamp.inc


class Form(Protocol[RecordT]):
    """How records of a kind rest in documents."""

    id_field: str
    """The part of a document's `_id` that tells the records of a partition apart."""
    has_marks: bool
    """Whether the database puts something into its documents that `stored` needs."""

    def key(self, record_id: str) -> Document:
        """The `_id` of a record's document."""
        ...

    def insert(self, record: RecordT, token: ObjectId, spill: Spill) -> Document:
        """The document of a new record."""
        ...

    def update(self, document: Document, states: Sequence[RecordT], spill: Spill) -> Document:
        """The update that takes a document from the first of these states through the others to the last."""
        ...

    def record(self, document: Document, contents: Contents) -> RecordT:
        """The record in a document."""
        ...

    def is_small(self, record: RecordT) -> bool:
        """Whether thousands of its like may be held in memory."""
        ...

    def stored(self, record: RecordT, marks: Document) -> RecordT:
        """The record with what the database gave it when it stored it."""
        ...


def with_token(update: Document, token: ObjectId) -> Document:
    """Mark an update as this change."""
    update.setdefault("$set", {})["change"] = token
    update["$push"] = {"recent": {"$each": [token], "$slice": -_REMEMBERED_CHANGES}}
    return update


def updated_document(document: Document, update: Document, marks: Document) -> Document:
    """What an update of ours made of a document, as far as the next one needs to know. `marks` tells what the database
    put in."""
    result = {**document, **marks}
    for path, value in update["$set"].items():
        name, _, index = path.partition(".")
        if index:
            elements = list(result[name])
            elements[int(index) : int(index) + 1] = [value]
            result[name] = elements
        else:
            result[name] = value
    for name in update.get("$unset", ()):
        result.pop(name, None)
    return result


class _Edit:
    """An update in the making."""

    def __init__(self) -> None:
        self.set: Document = {}
        self.unset: Document = {}
        self.tick: Document = {}

    def put(self, name: str, before: Any, after: Any) -> None:
        """A field that is absent when it is None."""
        if after is None:
            if before is not None:
                self.unset[name] = ""
        elif after != before:
            self.set[name] = after

    def mark(self, name: str, is_so: Sequence[bool]) -> None:
        """A field with the time at which something became so last, and absent while it is not.

        Args:
            name: Its name.
            is_so: What is the case, state by state.
        """
        if not is_so[-1]:
            if is_so[0]:
                self.unset[name] = ""
        elif not all(is_so):
            self.tick[name] = _TICK

    def document(self) -> Document:
        parts = {"$set": self.set, "$unset": self.unset, "$currentDate": self.tick}
        return {operator: fields for operator, fields in parts.items() if fields}


class RolloutForm:
    """A rollout with its attempts is one document.

    Args:
        partition: Whose.
        retain_seconds: How long after its end a rollout is kept.
    """

    id_field = "rollout_id"
    has_marks = True

    def __init__(self, partition: str, retain_seconds: float | None) -> None:
        self._partition = partition
        self._retain_seconds = retain_seconds

    def key(self, record_id: str) -> Document:
        return {"partition": self._partition, self.id_field: record_id}

    def insert(self, record: RolloutRecord, token: ObjectId, spill: Spill) -> Document:
        document: Document = {
            "_id": self.key(record.rollout_id),
            "partition": self._partition,
            "ordinal": NEXT,
            "revision": NEXT,
            "change": token,
            "recent": [token],
            "status": record.status,
            "start_time": record.start_time,
            "end_time": record.end_time,
            "mode": record.mode,
            "resources_id": record.resources_id,
            "input": spill.place(record.input),
            "metadata": spill.place(record.metadata),
            "config": _config_document(record.config),
            "attempts": [_attempt_document(attempt, None, None, spill) for attempt in record.attempts],
            "attempt_counts": _count_by_status(record),
            "applied": _applied_documents(record),
        }
        deadline = lifecycle.next_deadline(record)
        if deadline is not None:
            document["deadline"] = deadline
        if lifecycle.is_queued(record):
            document["queue"] = NEXT
        if lifecycle.is_finished(record):
            document["finished"] = NEXT
            if self._retain_seconds is not None:
                document["expire_at"] = self._expiry()
        return document

    def update(self, document: Document, states: Sequence[RolloutRecord], spill: Spill) -> Document:
        before, after = states[0], states[-1]
        edit = _Edit()
        edit.tick["revision"] = _TICK
        if any(lifecycle.visible(one) != lifecycle.visible(other) for one, other in pairwise(states)):
            edit.tick["changed"] = _TICK  # for the change streams of other servers
        for name in ("status", "start_time", "end_time", "mode", "resources_id"):
            if getattr(after, name) != getattr(before, name):
                edit.set[name] = getattr(after, name)
        for name in ("input", "metadata"):
            if getattr(after, name) is not getattr(before, name):
                edit.set[name] = spill.replace(document[name], getattr(after, name))
        if after.config is not before.config:
            edit.set["config"] = _config_document(after.config)
        if after.applied is not before.applied:
            edit.set["applied"] = _applied_documents(after)
        self._update_attempts(edit, document, before, after, spill)
        edit.put("deadline", document.get("deadline"), lifecycle.next_deadline(after))
        edit.mark("queue", list(map(lifecycle.is_queued, states)))
        edit.mark("finished", list(map(lifecycle.is_finished, states)))
        finished = lifecycle.is_finished(after)
        if finished and self._retain_seconds is not None and "expire_at" not in document:
            edit.set["expire_at"] = self._expiry()
        elif not finished and "expire_at" in document:
            edit.unset["expire_at"] = ""
        return edit.document()

    def _update_attempts(
        self, edit: _Edit, document: Document, before: RolloutRecord, after: RolloutRecord, spill: Spill
    ) -> None:
        if after.attempts is before.attempts:
            return
        for index, attempt in enumerate(after.attempts):
            known = before.attempts[index] if index < len(before.attempts) else None
            if attempt is not known:
                stored = None if known is None else document["attempts"][index]
                edit.set[f"attempts.{index}"] = _attempt_document(attempt, known, stored, spill)
        counts = _count_by_status(after)
        if counts != document["attempt_counts"]:
            edit.set["attempt_counts"] = counts

    def _expiry(self) -> datetime:
        assert self._retain_seconds is not None
        return datetime.now(timezone.utc) + timedelta(seconds=self._retain_seconds)

    def record(self, document: Document, contents: Contents) -> RolloutRecord:
        return RolloutRecord(
            rollout_id=document["_id"]["rollout_id"],
            input=content(document["input"], contents),
            status=document["status"],
            start_time=document["start_time"],
            config=_config_record(document["config"]),
            mode=document["mode"],
            resources_id=document["resources_id"],
            metadata=content(document["metadata"], contents),
            end_time=document["end_time"],
            attempts=tuple(_attempt_record(stored, contents) for stored in document["attempts"]),
            applied=tuple(AppliedRequest(done["request"], done["value"]) for done in document["applied"]),
            revision=number(document["revision"]),
        )

    def is_small(self, record: RolloutRecord) -> bool:
        payloads = (record.input, record.metadata, *(attempt.metadata for attempt in record.attempts))
        return len(record.attempts) <= 8 and sum(len(data) for data in payloads if data) <= _SMALL_BYTES

    def stored(self, record: RolloutRecord, marks: Document) -> RolloutRecord:
        return record._replace(revision=number(marks["revision"]))


_ATTEMPT_FIELDS = (
    "attempt_id",
    "sequence_id",
    "status",
    "start_time",
    "end_time",
    "worker_id",
    "instance_id",
    "last_heartbeat_time",
    "last_span_sequence_id",
)


def _attempt_document(
    attempt: AttemptRecord, known: AttemptRecord | None, stored: Document | None, spill: Spill
) -> Document:
    document: Document = {name: getattr(attempt, name) for name in _ATTEMPT_FIELDS}
    if known is not None and stored is not None:
        document["metadata"] = (
            stored["metadata"]
            if attempt.metadata is known.metadata
            else spill.replace(stored["metadata"], attempt.metadata, INLINE_PER_ATTEMPT_BYTES)
        )
    else:
        document["metadata"] = spill.place(attempt.metadata, INLINE_PER_ATTEMPT_BYTES)
    return document


def _attempt_record(stored: Document, contents: Contents) -> AttemptRecord:
    fields = {name: stored[name] for name in _ATTEMPT_FIELDS}
    return AttemptRecord(**fields, metadata=content(stored["metadata"], contents))


def _count_by_status(record: RolloutRecord) -> dict[str, int]:
    """How many attempts of each status; in an order that depends on nothing else, so that the database can group."""
    return dict(sorted(Counter(attempt.status for attempt in record.attempts).items()))


def _config_document(config: ConfigRecord) -> Document:
    return {
        "timeout_seconds": config.timeout_seconds,
        "unresponsive_seconds": config.unresponsive_seconds,
        "max_attempts": config.max_attempts,
        "retry_condition": list(config.retry_condition),
    }


def _config_record(stored: Document) -> ConfigRecord:
    return _shared_config(
        stored["timeout_seconds"],
        stored["unresponsive_seconds"],
        stored["max_attempts"],
        tuple(stored["retry_condition"]),
    )


@functools.lru_cache(maxsize=1024, typed=True)
def _shared_config(
    timeout_seconds: float | None,
    unresponsive_seconds: float | None,
    max_attempts: int,
    retry_condition: tuple[AttemptStatus, ...],
) -> ConfigRecord:
    """Rollouts by the million have few different ones."""
    return ConfigRecord(timeout_seconds, unresponsive_seconds, max_attempts, retry_condition)


def _applied_documents(record: RolloutRecord) -> list[Document]:
    return [{"request": done.request_digest, "value": done.value} for done in record.applied]


_WORKER_FIELDS = (
    "last_heartbeat_time",
    "last_dequeue_time",
    "last_busy_time",
    "last_idle_time",
    "silent_after_seconds",
)


class WorkerForm:
    """A worker is a document.

    Args:
        partition: Whose.
    """

    id_field = "worker_id"
    has_marks = False

    def __init__(self, partition: str) -> None:
        self._partition = partition

    def key(self, record_id: str) -> Document:
        return {"partition": self._partition, self.id_field: record_id}

    def insert(self, record: WorkerRecord, token: ObjectId, spill: Spill) -> Document:
        return {
            "_id": self.key(record.worker_id),
            "partition": self._partition,
            "ordinal": NEXT,
            "change": token,
            "recent": [token],
            **{name: getattr(record, name) for name in _WORKER_FIELDS},
            "heartbeat_stats": spill.place(record.heartbeat_stats),
            "leases": _lease_documents(record),
        }

    def update(self, document: Document, states: Sequence[WorkerRecord], spill: Spill) -> Document:
        before, after = states[0], states[-1]
        edit = _Edit()
        for name in _WORKER_FIELDS:
            if getattr(after, name) != getattr(before, name):
                edit.set[name] = getattr(after, name)
        if after.heartbeat_stats is not before.heartbeat_stats:
            edit.set["heartbeat_stats"] = spill.replace(document["heartbeat_stats"], after.heartbeat_stats)
        if after.leases is not before.leases:
            edit.set["leases"] = _lease_documents(after)
        return edit.document()

    def record(self, document: Document, contents: Contents) -> WorkerRecord:
        return WorkerRecord(
            worker_id=document["_id"]["worker_id"],
            heartbeat_stats=content(document["heartbeat_stats"], contents),
            leases=tuple(
                Lease(lease["rollout_id"], lease["attempt_id"], lease["instance_id"])
                for lease in document["leases"]
            ),
            **{name: document[name] for name in _WORKER_FIELDS},
        )

    def is_small(self, record: WorkerRecord) -> bool:
        return len(record.leases) <= 64 and len(record.heartbeat_stats or b"") <= _SMALL_BYTES

    def stored(self, record: WorkerRecord, marks: Document) -> WorkerRecord:
        return record


def _lease_documents(record: WorkerRecord) -> list[Document]:
    return [
        {"rollout_id": lease.rollout_id, "attempt_id": lease.attempt_id, "instance_id": lease.instance_id}
        for lease in record.leases
    ]


def resources_document(partition: str, record: ResourcesRecord, token: ObjectId, spill: Spill) -> Document:
    """A version of resources is a document."""
    return {
        "_id": {"partition": partition, "resources_id": record.resources_id, "version": record.version},
        "partition": partition,
        "ordinal": NEXT,
        "change": token,
        "create_time": record.create_time,
        "update_time": record.update_time,
        "request": record.request_digest,
        "resources": [{"name": name, "fields": spill.place(data)} for name, data in record.resources],
    }


def resources_record(document: Document, contents: Contents) -> ResourcesRecord:
    """The version of resources in a document."""
    return ResourcesRecord(
        resources_id=document["_id"]["resources_id"],
        version=document["_id"]["version"],
        create_time=document["create_time"],
        update_time=document["update_time"],
        resources=tuple((part["name"], content(part["fields"], contents)) for part in document["resources"]),
        request_digest=document["request"],
    )
