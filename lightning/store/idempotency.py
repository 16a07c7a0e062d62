"""Repeated requests: a caller that lost a reply asks again, and must not have its work done twice.

Whoever serves remote callers runs a verb inside `request(request_id)`. The identifiers that the verb makes are then
derived from the request id, so a repeat finds what the first call made, on every backend and after any restart; and a
change to an existing record notes the request in the record itself, in the same atomic step. No table of outcomes has
to be kept beside the data, or kept in step with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b

from lightning.store.records import AppliedRequest, RolloutRecord

_MAX_REMEMBERED_REQUESTS = 16
"""Per rollout. Only a repeat that comes after so many other changes to the same rollout would be taken for new."""

_request_id: ContextVar[str | None] = ContextVar("lightning_request_id", default=None)


@contextmanager
def request(request_id: str | None) -> Iterator[None]:
    """Let the verbs called inside belong to this request; None or empty: to none."""
    token = _request_id.set(request_id or None)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request(part: str = "") -> str | None:
    """A short digest of the id of the request being served, or None.

    Args:
        part: Tells the changes that one request makes to the same record apart.
    """
    request_id = _request_id.get()
    return None if request_id is None else _digest(f"{part}:{request_id}", 8)


def id_source(prefix: str) -> Callable[[int], str]:
    """Makes identifiers such as `ro-…`, by number: random ones, or the same ones for a repeat of the same request."""
    request_id = _request_id.get()
    if request_id is None:
        return lambda index: f"{prefix}-{uuid.uuid4().hex}"
    return lambda index: f"{prefix}-{_digest(f'{prefix}:{index}:{request_id}', 16)}"


def new_ids(prefix: str, count: int) -> list[str]:
    """The first `count` identifiers of an `id_source`."""
    return list(map(id_source(prefix), range(count)))


def applied_value(record: RolloutRecord, request_digest: str | None) -> int | None:
    """What `mark_applied` noted when this request changed the record; None if it has not."""
    if request_digest is None:
        return None
    return next((done.value for done in record.applied if done.request_digest == request_digest), None)


def mark_applied(record: RolloutRecord, request_digest: str | None, value: int = 0) -> RolloutRecord:
    """Note in the record that this request changed it, and a number that its outcome depends on."""
    if request_digest is None:
        return record
    applied = (*record.applied, AppliedRequest(request_digest, value))
    return record._replace(applied=applied[-_MAX_REMEMBERED_REQUESTS:])


def _digest(text: str, size_bytes: int) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size_bytes).hexdigest()
