"""The client: the whole `LightningStore` contract, over gRPC."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from os import getpid, register_at_fork
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from lightningpb.v1 import rollout_pb2, span_pb2, worker_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.codec.building import build, encode_object
from lightning.rpc import loop
from lightning.rpc.address import parse_endpoint
from lightning.rpc.connection import Connection
from lightning.rpc.credentials import FilePath, find_credentials
from lightning.rpc.options import ClientOptions
from lightning.rpc.reads import RemoteReads
from lightning.rpc.relay import RelayedConnection
from lightning.store.arguments import (
    check_count,
    check_requests,
    check_resources_id,
    check_time,
    check_worker_id,
    config_record,
)
from lightning.store.numbers import check_revision
from lightning.store.queries import check_wait
from lightning.store.texts import check_ids, check_text
from lightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    HeartbeatReply,
    LightningStoreCapabilities,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutEvent,
    RolloutMode,
    RolloutStatus,
    Span,
    Unset,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    encode_payload,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T = TypeVar("T")

_WAIT_SLICE_SECONDS = 60.0
"""Longer waits are made of several calls, so that no call is open for ever."""
_MAX_BATCH_BYTES = 16 * 1024 * 1024
"""Spans are sent in requests of about this size; one that is larger alone, which may be the server's to refuse."""
_READY_TIMEOUT_SECONDS = 60.0

_ids = Random()
"""A generator of our own, for whoever seeds that of `random` must not get the same ids again; and quicker than asking
the system, which lets other threads in meanwhile."""
register_at_fork(after_in_child=_ids.seed)


class LightningStoreClient(RemoteReads):
    """A store that is served elsewhere.

    May be used from any thread and event loop. Pickled, it takes only its address and options along: the names of files
    of certificates, and a token as it is. It connects when it is first used. Calls that fail because the server is away
    are repeated under the same request id, so that nothing happens twice; when it stays away they raise
    `StoreUnavailableError`. All other errors are raised as the store raised them.

    Args:
        address: `"host:port"`, or `"grpcs://host:port"` for a connection by TLS, which the options about TLS ask for
            too. `grpc://` and `http://` mean without TLS, `https://` with it.
        retry_delays: How long to wait before each repetition of a call, in seconds; their number is that of
            repetitions.
        health_retry_delays: Before a repetition the server must answer a health check; how long to wait between
            checks, in seconds.
        request_timeout: How long one try of a call may take, in seconds, beside what it waits for.
        connection_timeout: How long one try to connect, or one health check, may take, in seconds.
        max_message_bytes: The largest answer that is accepted.
        tls_ca: The file of the authorities that the server's certificate must come from (PEM). None:
            `LIGHTNING_TLS_CA`, else the public ones.
        tls_cert: The file of the client's own certificate (PEM), for a server that asks for one, and
        tls_key: of its private key. None: `LIGHTNING_TLS_CERT` and `LIGHTNING_TLS_KEY`.
        tls_server_name: The name to find in the server's certificate, if it is not the host in the address.
        token: Shows the server who calls. None: `LIGHTNING_TOKEN`.
        token_file: A file that holds the token, and is read again when it changes. None: `LIGHTNING_TOKEN_FILE`.
        allow_insecure: Whether a token may be sent to another machine unencrypted.

    Raises:
        ValueError: The address cannot be read, an option is out of range, a file is of no use, or options contradict
            each other.
    """

    def __init__(
        self,
        address: str,
        *,
        retry_delays: Sequence[float] = ClientOptions.retry_delays,
        health_retry_delays: Sequence[float] = ClientOptions.health_retry_delays,
        request_timeout: float = ClientOptions.request_timeout,
        connection_timeout: float = ClientOptions.connection_timeout,
        max_message_bytes: int = ClientOptions.max_message_bytes,
        tls_ca: FilePath | None = None,
        tls_cert: FilePath | None = None,
        tls_key: FilePath | None = None,
        tls_server_name: str | None = None,
        token: str | None = None,
        token_file: FilePath | None = None,
        allow_insecure: bool = False,
    ) -> None:
        endpoint = parse_endpoint(address)
        credentials = find_credentials(
            endpoint,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_server_name=tls_server_name,
            token=token,
            token_file=token_file,
            allow_insecure=allow_insecure,
        )
        self._endpoint = replace(endpoint, secure=credentials.tls is not None)
        self._options = ClientOptions(
            retry_delays=tuple(retry_delays),
            health_retry_delays=tuple(health_retry_delays),
            request_timeout=request_timeout,
            connection_timeout=connection_timeout,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
        )
        self._connection: Connection | RelayedConnection | None = None
        self._closed = False

    # --- About the connection ----------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The server's address, as `host:port`, or `grpcs://host:port` where the connection is by TLS."""
        return str(self._endpoint)

    async def wait_until_ready(self, timeout: float | None = _READY_TIMEOUT_SECONDS) -> None:
        """Wait until the server is there, and lets us in.

        Raises:
            StoreUnavailableError: It is not, after `timeout` seconds (None: never).
            UntrustedServerError: No secure connection can be made.
            Unauthenticated: The server wants another token.
        """
        await self._connect().wait_until_ready(timeout)
        await self._call("GetServerInfo", pb.GetServerInfoRequest())

    async def close(self) -> None:
        """Close the connection; the store stays as it is. Calls after that raise `RuntimeError`."""
        self._closed = True
        with loop.connecting():
            connection, self._connection = self._connection, None
        if connection is not None and connection.pid == getpid():
            await connection.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"endpoint": self._endpoint, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._endpoint = state["endpoint"]
        self._options = state["options"]
        self._connection = None
        self._closed = False

    def _connect(self) -> Connection | RelayedConnection:
        connection = self._connection
        if connection is None or connection.pid != getpid():
            with loop.connecting():
                if self._closed:
                    raise RuntimeError(f"the client of {self._endpoint} was closed")
                connection = self._connection
                if connection is None or connection.pid != getpid():
                    kind = RelayedConnection if loop.is_dead() else Connection
                    connection = self._connection = kind(self._endpoint, self._options)
                    weakref.finalize(self, connection.abandon).atexit = False
        return connection

    async def _unary(self, method: str, request: bytes, wait: float) -> bytes:
        return await self._connect().unary(method, request, self._options.request_timeout + wait)

    async def _stream(self, method: str, request: bytes, take: Callable[[bytes], T]) -> list[T]:
        return await self._connect().collect(method, request, take)

    # --- About the store ---------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        """What this client can do, whatever the store behind the server: it answers without asking."""
        return {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": True}

    # --- Handing out work --------------------------------------------------------------------------------------

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        check_worker_id(worker_id)
        spec = _spec_message(_spec(input, mode, resources_id, config, metadata))
        request = build(pb.StartRolloutRequest, request_id=_new_id(), spec=spec, worker_id=worker_id)
        return codec.attempted_rollout_from_proto((await self._call("StartRollout", request)).rollout)

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        return (await self.enqueue_many_rollouts([_spec(input, mode, resources_id, config, metadata)]))[0]

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        check_requests(rollouts)
        specs = [_spec_message(rollout) for rollout in rollouts]
        response = await self._call(
            "EnqueueRollouts", pb.EnqueueRolloutsRequest(request_id=_new_id(), specs=specs)
        )
        return [codec.rollout_from_proto(rollout) for rollout in response.rollouts]

    async def dequeue_rollout(self, worker_id: str | None = None) -> AttemptedRollout | None:
        claimed = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id)
        return claimed[0] if claimed else None

    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        check_count(limit, "limit", least=0)
        return _claimed(await self._dequeue(limit, worker_id, None, None))

    async def claim_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        instance_id: str | None = None,
        timeout: float | None = None,
    ) -> Sequence[AttemptedRollout]:
        check_count(limit, "limit", least=1)
        for wait, is_last in _slices(timeout):
            response = await self._dequeue(limit, worker_id, instance_id, wait)
            if response.rollouts or (response.complete and is_last):
                return _claimed(response)
        raise AssertionError("the slices do not end by themselves")

    async def _dequeue(
        self, limit: int, worker_id: str | None, instance_id: str | None, wait: float | None
    ) -> pb.DequeueRolloutsResponse:
        check_worker_id(worker_id)
        request = build(
            pb.DequeueRolloutsRequest,
            request_id=_new_id(),
            limit=limit,
            worker_id=worker_id,
            instance_id=instance_id,
            wait_seconds=wait,
        )
        response: pb.DequeueRolloutsResponse = await self._call("DequeueRollouts", request, wait or 0.0)
        return response

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        check_text(rollout_id, "rollout_id")
        check_worker_id(worker_id)
        request = build(
            pb.StartAttemptRequest, request_id=_new_id(), rollout_id=rollout_id, worker_id=worker_id
        )
        return codec.attempted_rollout_from_proto((await self._call("StartAttempt", request)).rollout)

    # --- Recording what happened -------------------------------------------------------------------------------

    async def add_span(self, span: Span) -> Span | None:
        stored = await self._add_spans([span])
        return codec.span_from_proto(stored[0]) if stored else None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        return codec.DecodedLater(codec.span_from_proto, await self._add_spans(spans))

    async def _add_spans(self, spans: Sequence[Span]) -> list[span_pb2.Span]:
        messages = [codec.span_to_proto(span) for span in spans]  # all are checked before the first is sent
        encoded = [message.SerializeToString() for message in messages]
        receipts: list[span_pb2.SpanReceipt] = []
        if encoded:
            for part in codec.chunked(b"", pb.AddSpansRequest.SPANS_FIELD_NUMBER, encoded, _MAX_BATCH_BYTES):
                start = pb.AddSpansRequest(request_id=_new_id()).SerializeToString()
                receipts += (await self._call("AddSpans", start + part)).receipts
        stored: list[span_pb2.Span] = []
        for message, receipt in zip(messages, receipts, strict=True):
            if receipt.stored:
                message.sequence_id = receipt.sequence_id
                stored.append(message)
        return stored

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        return await self.add_span(
            Span.from_opentelemetry(readable_span, rollout_id, attempt_id, sequence_id or 0)
        )

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(
        self, rollout_attempt_ids: Sequence[tuple[str, str]]
    ) -> Sequence[int]:
        attempts = [
            build(worker_pb2.AttemptRef, rollout_id=rollout_id, attempt_id=attempt_id)
            for rollout_id, attempt_id in rollout_attempt_ids
        ]
        request = pb.AllocateSpanSequenceIdsRequest(request_id=_new_id(), attempts=attempts)
        return list((await self._call("AllocateSpanSequenceIds", request)).sequence_ids)

    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None
    ) -> list[Rollout]:
        wanted = list(dict.fromkeys(check_ids(rollout_ids, "rollout_ids")))
        finished: dict[str, Rollout] = {}
        for wait, is_last in _slices(timeout):
            missing = [rollout_id for rollout_id in wanted if rollout_id not in finished]
            request = build(pb.WaitForRolloutsRequest, rollout_ids=missing, timeout_seconds=wait)
            response = await self._call("WaitForRollouts", request, wait)
            for message in response.rollouts:
                finished[message.rollout_id] = codec.rollout_from_proto(message)
            if len(finished) == len(wanted) or (response.complete and is_last):
                break
        return [finished[rollout_id] for rollout_id in wanted if rollout_id in finished]

    async def watch_rollouts(
        self, *, rollout_ids: Sequence[str], after_revision: int | None = None
    ) -> AsyncGenerator[RolloutEvent, None]:
        check_revision(after_revision)
        wanted = list(dict.fromkeys(check_ids(rollout_ids, "rollout_ids")))
        connection = self._connect()
        key = await connection.open_watch(wanted, after_revision)
        try:
            while (event := await connection.next_event(key)) is not None:
                yield event
        finally:
            if not connection.closed:
                await connection.close_watch(key)

    # --- Resources ---------------------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        request = pb.AddResourcesRequest(request_id=_new_id(), resources=codec.resources_to_proto(resources))
        return codec.update_from_proto((await self._call("AddResources", request)).update)

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        check_text(resources_id, "resources_id")
        request = build(
            pb.UpdateResourcesRequest,
            request_id=_new_id(),
            resources_id=resources_id,
            resources=codec.resources_to_proto(resources),
        )
        return codec.update_from_proto((await self._call("UpdateResources", request)).update)

    # --- Changing records --------------------------------------------------------------------------------------

    async def update_rollout(
        self,
        rollout_id: str,
        input: Any | Unset = UNSET,
        mode: RolloutMode | None | Unset = UNSET,
        resources_id: str | None | Unset = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Rollout:
        check_text(rollout_id, "rollout_id")
        if resources_id is not UNSET:
            check_resources_id(resources_id)
        if config is not UNSET:
            config_record(config)
        request = codec.rollout_changes_to_proto(
            _new_id(),
            rollout_id,
            input=input,
            mode=mode,
            resources_id=resources_id,
            status=status,
            config=config,
            metadata=metadata,
        )
        return codec.rollout_from_proto((await self._call("UpdateRollout", request)).rollout)

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | None | Unset = UNSET,
        last_heartbeat_time: float | None | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Attempt:
        check_text(rollout_id, "rollout_id")
        check_text(attempt_id, "attempt_id")
        if last_heartbeat_time is not UNSET:
            check_time(last_heartbeat_time, "last_heartbeat_time")
        request = codec.attempt_changes_to_proto(
            _new_id(),
            rollout_id,
            attempt_id,
            status=status,
            worker_id=worker_id,
            last_heartbeat_time=last_heartbeat_time,
            metadata=metadata,
        )
        return codec.attempt_from_proto((await self._call("UpdateAttempt", request)).attempt)

    async def update_worker(
        self, worker_id: str, heartbeat_stats: dict[str, Any] | None | Unset = UNSET
    ) -> Worker:
        check_worker_id(worker_id, required=True)
        stats: bytes | None = None
        if heartbeat_stats is None:
            stats = encode_payload(None, "heartbeat_stats")
        elif heartbeat_stats is not UNSET:
            stats = encode_object(heartbeat_stats, "heartbeat_stats")
        request = build(
            pb.UpdateWorkerRequest, request_id=_new_id(), worker_id=worker_id, heartbeat_stats_json=stats
        )
        return codec.worker_from_proto((await self._call("UpdateWorker", request)).worker)

    # --- For runners -------------------------------------------------------------------------------------------

    async def deliver_spans(self, spans: Sequence[Span]) -> int:
        encoded = [codec.encode_span(span) for span in spans]
        return await self._connect().deliver_spans(encoded) if encoded else 0

    async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
        request = pb.SendHeartbeatRequest(request_id=_new_id(), heartbeat=codec.heartbeat_to_proto(heartbeat))
        response = await self._call("SendHeartbeat", request)
        commands = [codec.command_from_proto(command) for command in response.commands]
        return HeartbeatReply(
            worker=codec.worker_from_proto(response.worker),
            commands=[command for command in commands if command is not None],
        )

    async def receive_commands(
        self, worker_id: str, *, instance_id: str | None = None, timeout: float | None = None
    ) -> Sequence[WorkerCommand]:
        wait = check_wait(timeout)
        check_worker_id(worker_id, required=True)
        return await self._connect().receive_commands(worker_id, instance_id, wait)

    async def send_command(self, command: WorkerCommand, worker_id: str | None = None) -> int:
        request = build(
            pb.SendWorkerCommandRequest,
            request_id=_new_id(),
            command=codec.command_to_proto(command),
            worker_id=worker_id,
        )
        received: int = (await self._call("SendWorkerCommand", request)).received
        return received


def _new_id() -> str:
    """A request id: fresh for each call, the same for its repetitions."""
    return f"{_ids.getrandbits(128):032x}"


def _spec(
    input: Any,
    mode: RolloutMode | None,
    resources_id: str | None,
    config: RolloutConfig | None,
    metadata: dict[str, Any] | None,
) -> EnqueueRolloutRequest:
    # not validated here, but where it is sent, in the same words as a local store
    return EnqueueRolloutRequest.model_construct(
        input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
    )


def _spec_message(spec: EnqueueRolloutRequest) -> rollout_pb2.RolloutSpec:
    check_resources_id(spec.resources_id)
    config_record(spec.config)
    return codec.spec_to_proto(spec)


def _claimed(response: pb.DequeueRolloutsResponse) -> list[AttemptedRollout]:
    return [codec.attempted_rollout_from_proto(rollout) for rollout in response.rollouts]


def _slices(timeout: float | None) -> Iterator[tuple[float, bool]]:
    """How long to wait in each of the calls that a long wait is made of, and whether the time is up after it. It is up
    to the caller to stop then."""
    seconds = check_wait(timeout)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    while True:
        rest = max(0.0, deadline - time.monotonic())
        yield min(rest, _WAIT_SLICE_SECONDS), rest <= _WAIT_SLICE_SECONDS
