"""Errors across the wire: one table, read from left to right by the server and from right to left by the client.

What the store raises comes back as the same type with the same message: `ValueError` (unknown identifiers as its
subclass `UnknownIdError`), `TypeError`, `NotImplementedError`, `RuntimeError` (evicted spans as its subclass
`SpansEvictedError`, a full disk as `BackendFullError`, a watch that cannot go on as `RevisionGoneError`), `KeyError`,
`IndexError`, `LookupError`, `TimeoutError`. What only a remote store can raise:

    RemoteStoreError
    ├── StoreUnavailableError    the server stays away, or cannot reach its storage; also a ConnectionError
    │   ├── StoreDrainingError   the server is shutting down
    │   └── UntrustedServerError no secure connection: the message says what is wrong with whose certificate
    ├── StoreInternalError       the server or its store has a defect; the server's log has the traceback
    ├── LimitExceededError       the message says which limit, and which setting raises it
    │   └── OverloadedError      there is no room now and may be later; also a ConnectionError
    ├── Unauthenticated          no credentials, or bad ones
    └── PermissionDenied         the caller's role does not allow the call

A traceback never crosses the wire. The finer reason, the exception's type and its full message travel as an
`ErrorDetail` in the trailing metadata; a client that does not know it still has the status and the message.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from typing import Any, NoReturn

from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata, ServicerContext
from lightningpb.v1 import errors_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc.address import Endpoint
from lightning.store.broker import BrokerClosed
from lightning.store.contract import UnknownIdError
from lightning.store.persistence.abc import BackendFullError, SpansEvictedError
from lightning.store.polling import RevisionGoneError

logger = logging.getLogger(__name__)

DETAIL_METADATA_KEY = "lightning-error-bin"

_MAX_STATUS_MESSAGE_BYTES = 512
_MAX_DETAIL_MESSAGE_BYTES = 3072
"""Peers accept 8 KiB of metadata, in which this is written as base64 and the former percent-encoded."""


class RemoteStoreError(Exception):
    """The store is elsewhere, and the call failed for a reason that a local store does not have."""


class StoreUnavailableError(RemoteStoreError, ConnectionError):
    """The server could not be reached, retries included, or cannot reach its storage. Whether the last call had an
    effect is unknown, unless it only reads."""


class StoreDrainingError(StoreUnavailableError):
    """The server is shutting down and takes no new calls."""


class StreamAgedError(StoreUnavailableError):
    """The server has ended a stream that was open for as long as streams may be. For servers; clients go on."""


class UntrustedServerError(StoreUnavailableError):
    """No secure connection could be made: what answered does not speak TLS, or its certificate is not one that this
    client trusts."""


class StoreInternalError(RemoteStoreError):
    """The server, or the store behind it, has a defect. The message names the entry in the server's log."""


class LimitExceededError(RemoteStoreError):
    """A limit was exceeded. The message says which, and the setting that raises it."""


class OverloadedError(LimitExceededError, ConnectionError):
    """Too much is going on at once, so the call was refused before it began; later there may be room."""


class Unauthenticated(RemoteStoreError):
    """The server wants to know who is calling, and was shown no credentials or bad ones."""


class PermissionDenied(RemoteStoreError):
    """The caller's role does not allow the call."""


@dataclass(frozen=True)
class _Row:
    exception: type[BaseException]
    status: StatusCode
    reason: errors_pb2.ErrorReason.ValueType


_TABLE = (
    # The first row that an exception is an instance of describes it, so subclasses come first. The first row of a
    # reason and type name says what the client raises.
    _Row(OverloadedError, StatusCode.RESOURCE_EXHAUSTED, errors_pb2.ERROR_REASON_LIMIT_EXCEEDED),
    _Row(StoreDrainingError, StatusCode.UNAVAILABLE, errors_pb2.ERROR_REASON_DRAINING),
    _Row(StoreUnavailableError, StatusCode.UNAVAILABLE, errors_pb2.ERROR_REASON_UNAVAILABLE),
    _Row(BrokerClosed, StatusCode.UNAVAILABLE, errors_pb2.ERROR_REASON_UNAVAILABLE),
    _Row(ConnectionError, StatusCode.UNAVAILABLE, errors_pb2.ERROR_REASON_UNAVAILABLE),
    _Row(LimitExceededError, StatusCode.RESOURCE_EXHAUSTED, errors_pb2.ERROR_REASON_LIMIT_EXCEEDED),
    _Row(Unauthenticated, StatusCode.UNAUTHENTICATED, errors_pb2.ERROR_REASON_UNAUTHENTICATED),
    _Row(PermissionDenied, StatusCode.PERMISSION_DENIED, errors_pb2.ERROR_REASON_PERMISSION_DENIED),
    _Row(SpansEvictedError, StatusCode.FAILED_PRECONDITION, errors_pb2.ERROR_REASON_SPANS_EVICTED),
    _Row(RevisionGoneError, StatusCode.OUT_OF_RANGE, errors_pb2.ERROR_REASON_REVISION_COMPACTED),
    _Row(BackendFullError, StatusCode.RESOURCE_EXHAUSTED, errors_pb2.ERROR_REASON_STORAGE_FULL),
    _Row(UnknownIdError, StatusCode.NOT_FOUND, errors_pb2.ERROR_REASON_UNKNOWN_ID),
    _Row(ValueError, StatusCode.INVALID_ARGUMENT, errors_pb2.ERROR_REASON_INVALID_VALUE),
    _Row(TypeError, StatusCode.INVALID_ARGUMENT, errors_pb2.ERROR_REASON_WRONG_TYPE),
    _Row(NotImplementedError, StatusCode.UNIMPLEMENTED, errors_pb2.ERROR_REASON_NOT_SUPPORTED),
    _Row(TimeoutError, StatusCode.DEADLINE_EXCEEDED, errors_pb2.ERROR_REASON_DEADLINE),
    _Row(asyncio.TimeoutError, StatusCode.DEADLINE_EXCEEDED, errors_pb2.ERROR_REASON_DEADLINE),
    _Row(StoreInternalError, StatusCode.INTERNAL, errors_pb2.ERROR_REASON_INTERNAL),
    _Row(KeyError, StatusCode.INTERNAL, errors_pb2.ERROR_REASON_INTERNAL),
    _Row(IndexError, StatusCode.INTERNAL, errors_pb2.ERROR_REASON_INTERNAL),
    _Row(LookupError, StatusCode.INTERNAL, errors_pb2.ERROR_REASON_INTERNAL),
    _Row(RuntimeError, StatusCode.INTERNAL, errors_pb2.ERROR_REASON_INTERNAL),
)

_BY_TYPE = {(row.reason, row.exception.__name__): row.exception for row in reversed(_TABLE)}
_GENERAL = [row for row in reversed(_TABLE) if row.exception is not OverloadedError]
_BY_REASON = {row.reason: row.exception for row in _GENERAL}
_BY_STATUS = {row.status: row.exception for row in _GENERAL}

_STATUSES = {status.value[0]: status for status in StatusCode}

_CONNECTION_REASONS = frozenset({errors_pb2.ERROR_REASON_UNAVAILABLE, errors_pb2.ERROR_REASON_DRAINING})
_CONNECTION_STATUSES = frozenset(
    {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED, StatusCode.UNKNOWN}
)
_BROKEN_STREAM_SIGNS = (
    *("RST_STREAM", "GOAWAY", "stream terminated", "transport", "connection", "EOF"),
    "Internal error from Core",
)
"""How the C core words a connection that broke in mid-call, which it may call INTERNAL; the last is what a client says
whose message came too late for a stream that the server has ended, so that why it did is not known."""

_TLS_PROBLEMS = {
    "certificate has expired": "the server's certificate has expired; whoever runs the server must renew it",
    "certificate is not yet valid": "the server's certificate is not valid yet; are both clocks right?",
    "Hostname Verification Check failed": "the server's certificate is for another name; connect to the name that it "
    "is for, or give that as tls_server_name",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate comes from an authority that this client does not trust; "
    "give the authority's certificate as tls_ca (LIGHTNING_TLS_CA, --tls-ca)",
    "WRONG_VERSION_NUMBER": "what answers there does not speak TLS; without it the address begins with grpc://",
}
"""What the C core says of a connection that it could not make, and what that means to people. The first counts."""


@dataclass(frozen=True)
class Failure:
    """How a call failed, ready to be sent."""

    status: StatusCode
    message: str
    detail: bytes

    @property
    def leaves_open(self) -> bool:
        """Whether it is unknown what the call did, so that its repeat should do it rather than hear the same again."""
        return self.status in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.DEADLINE_EXCEEDED)


def to_failure(error: Exception) -> Failure:
    """Describe an exception that a server's handler raised. What nobody expects is logged, and named in the message."""
    row = next((row for row in _TABLE if isinstance(error, row.exception)), None)
    if row is None:
        return to_failure(_internal(error))
    if row.reason == errors_pb2.ERROR_REASON_INTERNAL and not isinstance(error, StoreInternalError):
        logger.warning("a call failed in the store", exc_info=error)
    message = _message_of(error)
    detail = errors_pb2.ErrorDetail(
        reason=row.reason,
        exception_type=row.exception.__name__,
        message=_cut(message, _MAX_DETAIL_MESSAGE_BYTES),
    )
    return Failure(row.status, _cut(message, _MAX_STATUS_MESSAGE_BYTES), detail.SerializeToString())


async def abort(context: ServicerContext[Any, Any], failure: Failure) -> NoReturn:
    """End a call with a failure. Always raises."""
    metadata = ((DETAIL_METADATA_KEY, failure.detail),)
    await context.abort(failure.status, failure.message, trailing_metadata=metadata)
    raise AssertionError("abort raises")


def from_status(error: AioRpcError, endpoint: str) -> Exception:
    """The exception that a client raises for a call that failed; `endpoint` is whom it called."""
    detail = _detail_of(error)
    message = error.details() or ""
    if detail is None:
        return _without_detail(error.code(), message, endpoint)
    known = _BY_TYPE.get((detail.reason, detail.exception_type)) or _BY_REASON.get(detail.reason)
    kind = known or _BY_STATUS.get(error.code(), StoreInternalError)
    return kind(detail.message or message)  # type: ignore[return-value]  # none of them is a mere BaseException


def to_rpc_error(failure: pb.PipelineResponse.Failure) -> AioRpcError:
    """How a call failed that came by a pipeline, as if it had been a single one."""
    status = _STATUSES.get(failure.status_code, StatusCode.UNKNOWN)
    detail = failure.detail.SerializeToString()
    return rpc_error(status, failure.message, Metadata((DETAIL_METADATA_KEY, detail)))


def rpc_error(
    status: StatusCode, message: str | None, trailing_metadata: Metadata | None = None
) -> AioRpcError:
    """What gRPC raises for a call that failed."""
    return AioRpcError(status, Metadata(), trailing_metadata or Metadata(), message)


def from_detail(detail: errors_pb2.ErrorDetail) -> Exception:
    """The exception that an `ErrorDetail` within a message stands for."""
    known = _BY_TYPE.get((detail.reason, detail.exception_type)) or _BY_REASON.get(detail.reason)
    return (known or StoreInternalError)(detail.message)  # type: ignore[return-value]


def is_connection_failure(error: AioRpcError) -> bool:
    """Whether the call did not get through or its answer was lost, so that it makes sense to repeat it."""
    detail = _detail_of(error)
    if detail is not None:
        return detail.reason in _CONNECTION_REASONS or is_overloaded(error)
    if error.code() is StatusCode.INTERNAL:
        return any(sign in (error.details() or "") for sign in _BROKEN_STREAM_SIGNS)
    return error.code() in _CONNECTION_STATUSES


def tls_problem(error: AioRpcError, endpoint: Endpoint) -> UntrustedServerError | None:
    """What is wrong if a call failed because no secure connection could be made, for a reason that stays."""
    said = error.details() or ""
    for sign, problem in _TLS_PROBLEMS.items():
        if endpoint.secure and sign in said:
            return UntrustedServerError(f"no secure connection to {endpoint}: {problem}")
    return None


def is_overloaded(error: AioRpcError) -> bool:
    """Whether the server refused the call because there was no room for it just then."""
    detail = _detail_of(error)
    return detail is not None and detail.exception_type == OverloadedError.__name__


def is_draining(error: AioRpcError) -> bool:
    """Whether the server refused the call because it is shutting down."""
    detail = _detail_of(error)
    return detail is not None and detail.reason == errors_pb2.ERROR_REASON_DRAINING


def _without_detail(status: StatusCode, message: str, endpoint: str) -> Exception:
    """gRPC itself ended the call, or a server that does not send details."""
    if status is StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        side = "LightningStoreClient" if "CLIENT: " in message else "LightningStoreServer"
        return LimitExceededError(
            f"a message between this client and {endpoint} is too large ({message}); raise max_message_bytes of {side}"
        )
    if status is StatusCode.UNIMPLEMENTED:
        return NotImplementedError(f"the server at {endpoint} does not know this call: {message}")
    kind = _BY_STATUS.get(status, StoreInternalError)
    return kind(message or f"the server at {endpoint} ended the call with {status.name}")  # type: ignore[return-value]


def _internal(error: Exception) -> StoreInternalError:
    incident = uuid.uuid4().hex[:12]
    logger.error("a call failed unexpectedly [%s]", incident, exc_info=error)
    return StoreInternalError(
        f"the store failed with an unexpected {type(error).__name__}; see [{incident}] in the server's log"
    )


def _message_of(error: Exception) -> str:
    """The message as raised; `str` of a `KeyError` would be its repr."""
    if len(error.args) == 1 and isinstance(error.args[0], str):
        return error.args[0]
    return str(error)


def _cut(message: str, limit_bytes: int) -> str:
    data = message.encode("utf-8", "backslashreplace")
    if len(data) <= limit_bytes:
        return data.decode("utf-8")
    return data[: limit_bytes - 3].decode("utf-8", "ignore") + "…"


def _detail_of(error: AioRpcError) -> errors_pb2.ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_METADATA_KEY and isinstance(value, bytes):
            try:
                return errors_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None
