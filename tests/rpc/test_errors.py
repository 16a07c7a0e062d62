"""Errors: what the store raises is what the client raises, and nothing else crosses the wire."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from lightningpb.v1 import errors_pb2

from lightning.rpc import (
    LightningStoreClient,
    LimitExceededError,
    PermissionDenied,
    StoreDrainingError,
    StoreInternalError,
    StoreUnavailableError,
    Unauthenticated,
)
from lightning.rpc.errors import DETAIL_METADATA_KEY, from_status, is_connection_failure, to_failure
from lightning.store.contract import UnknownIdError
from lightning.store.persistence.abc import BackendFullError, SpansEvictedError


def across_the_wire(error: Exception) -> AioRpcError:
    failure = to_failure(error)
    trailing = Metadata((DETAIL_METADATA_KEY, failure.detail))
    return AioRpcError(failure.status, Metadata(), trailing, details=failure.message)


def without_detail(status: StatusCode, message: str = "") -> AioRpcError:
    return AioRpcError(status, Metadata(), Metadata(), details=message)


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        (ValueError, "INVALID_ARGUMENT", "INVALID_VALUE"),
        (UnknownIdError, "NOT_FOUND", "UNKNOWN_ID"),
        (TypeError, "INVALID_ARGUMENT", "WRONG_TYPE"),
        (SpansEvictedError, "FAILED_PRECONDITION", "SPANS_EVICTED"),
        (NotImplementedError, "UNIMPLEMENTED", "NOT_SUPPORTED"),
        (StoreUnavailableError, "UNAVAILABLE", "UNAVAILABLE"),
        (StoreDrainingError, "UNAVAILABLE", "DRAINING"),
        (LimitExceededError, "RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"),
        (BackendFullError, "RESOURCE_EXHAUSTED", "STORAGE_FULL"),
        (Unauthenticated, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (PermissionDenied, "PERMISSION_DENIED", "PERMISSION_DENIED"),
        (TimeoutError, "DEADLINE_EXCEEDED", "DEADLINE"),
        (RuntimeError, "INTERNAL", "INTERNAL"),
        (KeyError, "INTERNAL", "INTERNAL"),
        (IndexError, "INTERNAL", "INTERNAL"),
        (LookupError, "INTERNAL", "INTERNAL"),
    ],
)
@pytest.mark.parametrize("message", ["unknown rollout 'ro-1'", "", "ü\n\0 100% \U0001f600"])
def test_type_and_message_survive(kind: type[Exception], status: str, reason: str, message: str) -> None:
    failure = to_failure(kind(message))
    assert failure.status.name == status
    detail = errors_pb2.ErrorDetail.FromString(failure.detail)
    assert errors_pb2.ErrorReason.Name(detail.reason) == f"ERROR_REASON_{reason}"
    raised = from_status(across_the_wire(kind(message)), "host:1")
    assert type(raised) is kind
    assert raised.args == (message,)


def test_a_subclass_comes_back_as_what_the_caller_can_know() -> None:
    class Odd(ValueError):
        pass

    raised = from_status(across_the_wire(Odd("odd")), "host:1")
    assert type(raised) is ValueError
    assert str(raised) == "odd"


def test_a_defect_is_logged_and_named_but_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    class DatabaseError(Exception):
        pass

    with caplog.at_level(logging.ERROR):
        raised = from_status(across_the_wire(DatabaseError("password=secret")), "host:1")
    assert type(raised) is StoreInternalError
    assert "DatabaseError" in str(raised)
    assert "secret" not in str(raised)
    incident = str(raised).split("[")[1].split("]")[0]
    (record,) = caplog.records
    assert incident in record.getMessage()
    assert record.exc_info is not None


def test_a_long_message_is_cut_to_what_headers_may_hold() -> None:
    failure = to_failure(ValueError("ü" * 100_000))
    assert len(failure.message.encode()) + len(failure.detail) < 4096
    assert from_status(across_the_wire(ValueError("ü" * 100_000)), "host:1").args[0].endswith("…")


def test_a_lone_surrogate_in_a_message_does_no_harm() -> None:
    assert str(from_status(across_the_wire(ValueError("a\udc80b")), "host:1")) == "a\\udc80b"


@pytest.mark.parametrize(
    ("status", "message", "kind", "mentions"),
    [
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max",
            LimitExceededError,
            "LightningStoreServer",
        ),
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "CLIENT: Received message larger than max",
            LimitExceededError,
            "LightningStoreClient",
        ),
        (StatusCode.RESOURCE_EXHAUSTED, "too many streams", LimitExceededError, "too many streams"),
        (StatusCode.UNIMPLEMENTED, "Method not found!", NotImplementedError, "host:1"),
        (StatusCode.UNAUTHENTICATED, "who are you?", Unauthenticated, "who are you?"),
        (StatusCode.PERMISSION_DENIED, "", PermissionDenied, "host:1"),
        (StatusCode.INVALID_ARGUMENT, "bad", ValueError, "bad"),
        (StatusCode.NOT_FOUND, "gone", ValueError, "gone"),
        (StatusCode.DATA_LOSS, "", StoreInternalError, "DATA_LOSS"),
    ],
)
def test_a_status_without_detail_is_understood_too(
    status: StatusCode, message: str, kind: type[Exception], mentions: str
) -> None:
    raised = from_status(without_detail(status, message), "host:1")
    assert isinstance(raised, kind)
    assert mentions in str(raised)


@pytest.mark.parametrize(
    ("error", "repeat"),
    [
        (without_detail(StatusCode.UNAVAILABLE), True),
        (without_detail(StatusCode.DEADLINE_EXCEEDED), True),
        (without_detail(StatusCode.CANCELLED), True),
        (without_detail(StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), True),
        (without_detail(StatusCode.INTERNAL, "Exception serializing request!"), False),
        (without_detail(StatusCode.RESOURCE_EXHAUSTED), False),
        (across_the_wire(StoreDrainingError("bye")), True),
        (across_the_wire(ConnectionResetError("the database is gone")), True),
        (across_the_wire(ValueError("no")), False),
        (across_the_wire(TimeoutError("the store took too long")), False),
        (across_the_wire(RuntimeError("no")), False),
    ],
)
def test_only_failures_of_the_network_are_repeated(error: AioRpcError, repeat: bool) -> None:
    assert is_connection_failure(error) is repeat


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [ValueError("v"), KeyError("k"), RuntimeError("r"), NotImplementedError("n"), TimeoutError("t")]
)
async def test_a_foreign_stores_error_reaches_the_caller(error: Exception, serve: Any, connect: Any) -> None:
    class Raising(RaisesOnRead):
        raised = error

    server = await serve(Raising())
    client: LightningStoreClient = connect(server.endpoint)
    for call in (client.get_rollout_by_id("ro-1"), client.query_rollouts(), client.enqueue_rollout(1)):
        with pytest.raises(type(error)) as caught:
            await call
        assert type(caught.value) is type(error)
        assert caught.value.args == error.args


class RaisesOnRead:
    """Has a store's methods, all of which fail."""

    raised: Exception

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("close", "capabilities"):
            raise AttributeError(name)

        async def fail(*args: Any, **kwargs: Any) -> Any:
            raise self.raised

        return fail
