"""What the server does for each RPC: decode the request, call the verb, encode what it returns. Nothing else."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.message import Message
from lightningpb.v1 import span_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.codec.building import decode_object
from lightning.rpc.requests import AddedSpans, ReceivedSpans
from lightning.store.contract import LightningStore
from lightning.store.engine import StoreEngine
from lightning.store.idempotency import request as request_scope
from lightning.store.queries import SpanQuery
from lightning.store.records import SpanReceipt, SpanRecord
from lightning.types import (
    UNSET,
    AttemptedRollout,
    LightningStoreCapabilities,
    PaginatedResult,
    Span,
    Unset,
)

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from lightning.rpc.service import StoreService

_FIRST_CLAIM = 8
"""How many rollouts are claimed before looking at how large they are."""
_CHUNK_BYTES = 1024 * 1024
"""How much of a query's result goes into one message, unless a single record is larger."""
_ANSWER_PARTS = 4
"""Answers that may be cut short are cut at this part of the largest message."""


class UnaryHandler(Protocol):
    """One request, one response."""

    def __call__(self, service: StoreService, request: Any, /) -> Awaitable[Message]: ...


@dataclass(frozen=True)
class Found:
    """What a query found, and how it is sent."""

    result: PaginatedResult[Any]
    response: Any
    """The class of the messages."""
    field: str
    """Where the records are in them."""
    encode: Callable[[Any], bytes]

    def messages(self) -> Iterator[bytes]:
        """The serialised messages that it is sent in: at least one, which says how much was found."""
        start = self.response(page_info=codec.page_info_to_proto(self.result)).SerializeToString()
        field: int = self.response.DESCRIPTOR.fields_by_name[self.field].number
        return codec.chunked(start, field, map(self.encode, self.result.items), _CHUNK_BYTES)


class QueryHandler(Protocol):
    """One request, a result that is sent in pieces."""

    def __call__(self, service: StoreService, request: Any, /) -> Awaitable[Found]: ...


# --- Handing out work ------------------------------------------------------------------------------------------


async def start_rollout(service: StoreService, request: pb.StartRolloutRequest) -> Message:
    spec = codec.spec_from_proto(request.spec)
    rollout = await service.store.start_rollout(
        spec.input, spec.mode, spec.resources_id, spec.config, spec.metadata, worker_id=_worker_id(request)
    )
    return pb.StartRolloutResponse(rollout=codec.rollout_to_proto(rollout))


async def enqueue_rollouts(service: StoreService, request: pb.EnqueueRolloutsRequest) -> Message:
    rollouts = await service.store.enqueue_many_rollouts(
        [codec.spec_from_proto(spec) for spec in request.specs]
    )
    return pb.EnqueueRolloutsResponse(rollouts=[codec.rollout_to_proto(rollout) for rollout in rollouts])


async def dequeue_rollouts(service: StoreService, request: pb.DequeueRolloutsRequest) -> Message:
    response = pb.DequeueRolloutsResponse()
    budget_bytes = service.limits.max_message_bytes // _ANSWER_PARTS
    asked = _seconds(request, "wait_seconds")
    wait = None if asked is None else service.bounded_wait(asked)
    step = min(request.limit, _FIRST_CLAIM)
    claimed = await _claim(service, request, step, wait)
    response.complete = claimed is not None and wait == asked
    while True:
        response.rollouts.extend(codec.rollout_to_proto(rollout) for rollout in claimed or ())
        if not claimed or len(claimed) < step or len(response.rollouts) >= request.limit:
            return response
        # Claimed is claimed: what does not fit into the answer would be lost. So take no more than surely fits.
        largest = max(rollout.ByteSize() for rollout in response.rollouts)
        room = (budget_bytes - response.ByteSize()) // largest
        step = min(request.limit - len(response.rollouts), room)
        if step <= 0:
            return response
        with request_scope(request.request_id and f"{request.request_id}/{len(response.rollouts)}"):
            claimed = await _claim(service, request, step, 0.0)


async def _claim(
    service: StoreService, request: pb.DequeueRolloutsRequest, limit: int, wait: float | None
) -> Sequence[AttemptedRollout] | None:
    """At most `limit` of what is in the queue, after at most `wait` seconds. None: the drain cut the wait short."""
    if wait is None and not request.HasField("instance_id"):
        return await service.store.dequeue_many_rollouts(limit=limit, worker_id=_worker_id(request))
    claim = service.store.claim_rollouts(
        limit=limit,
        worker_id=_worker_id(request),
        instance_id=_given(request, "instance_id"),
        timeout=wait or 0.0,
    )
    return await service.interruptible(claim, None)


async def start_attempt(service: StoreService, request: pb.StartAttemptRequest) -> Message:
    rollout = await service.store.start_attempt(request.rollout_id, worker_id=_worker_id(request))
    return pb.StartAttemptResponse(rollout=codec.rollout_to_proto(rollout))


async def wait_for_rollouts(service: StoreService, request: pb.WaitForRolloutsRequest) -> Message:
    asked = _seconds(request, "timeout_seconds")
    wait = service.bounded_wait(math.inf if asked is None else asked)
    finished = await service.interruptible(
        service.store.wait_for_rollouts(rollout_ids=list(request.rollout_ids), timeout=wait), None
    )
    if finished is None:
        return pb.WaitForRolloutsResponse(complete=False)
    response = pb.WaitForRolloutsResponse()
    budget_bytes = service.limits.max_message_bytes // _ANSWER_PARTS
    for rollout in finished:
        response.rollouts.append(codec.rollout_to_proto(rollout))
        budget_bytes -= response.rollouts[-1].ByteSize()
        if budget_bytes <= 0:
            break
    all_ended = len(response.rollouts) == len(set(request.rollout_ids))
    response.complete = all_ended or (wait == asked and len(response.rollouts) == len(finished))
    return response


# --- Recording what happened -----------------------------------------------------------------------------------


async def add_spans(service: StoreService, request: AddedSpans) -> Message:
    response = pb.AddSpansResponse()
    await receive_spans(service.store, request.spans, response.receipts)
    return response


async def receive_spans(
    store: LightningStore,
    spans: ReceivedSpans,
    receipts: RepeatedCompositeFieldContainer[span_pb2.SpanReceipt],
) -> None:
    """Store spans, and write what became of each where the answer has room for it, so that it need not be copied."""
    if isinstance(store, StoreEngine) and type(store).add_many_spans is StoreEngine.add_many_spans:
        # it keeps spans encoded as they are here
        records = []
        for span, encoded in zip(*spans, strict=True):
            codec.check_span(span, encoded)
            records.append(SpanRecord(span.attempt_id, span.span_id, span.sequence_id, encoded))
        given = await store.add_span_records([span.rollout_id for span in spans.messages], records)
    else:
        decoded = [codec.span_from_proto(span) for span in spans.messages]
        numbers = {_span_key(span): span.sequence_id for span in await store.add_many_spans(decoded)}
        # popped: a second one in the same request is a duplicate
        found = [numbers.pop(_span_key(span), None) for span in decoded]
        given = [SpanReceipt(number or 0, number is not None) for number in found]
    for sequence_id, stored in given:
        receipt = receipts.add()
        receipt.sequence_id = sequence_id
        receipt.stored = stored


def _span_key(span: Span) -> tuple[str, str, str]:
    return (span.rollout_id, span.attempt_id, span.span_id)


async def allocate_span_sequence_ids(
    service: StoreService, request: pb.AllocateSpanSequenceIdsRequest
) -> Message:
    pairs = [(attempt.rollout_id, attempt.attempt_id) for attempt in request.attempts]
    numbers = await service.store.get_many_span_sequence_ids(pairs)
    return pb.AllocateSpanSequenceIdsResponse(sequence_ids=numbers)


# --- Looking things up -----------------------------------------------------------------------------------------


async def get_rollout(service: StoreService, request: pb.GetRolloutRequest) -> Message:
    rollout = await service.store.get_rollout_by_id(request.rollout_id)
    return pb.GetRolloutResponse(rollout=None if rollout is None else codec.rollout_to_proto(rollout))


async def get_latest_attempt(service: StoreService, request: pb.GetLatestAttemptRequest) -> Message:
    attempt = await service.store.get_latest_attempt(request.rollout_id)
    return pb.GetLatestAttemptResponse(attempt=None if attempt is None else codec.attempt_to_proto(attempt))


async def get_resources(service: StoreService, request: pb.GetResourcesRequest) -> Message:
    versions = (request.version,) if request.HasField("version") else ()
    update = await service.store.get_resources_by_id(request.resources_id, *versions)
    return pb.GetResourcesResponse(update=None if update is None else codec.update_to_proto(update))


async def get_latest_resources(service: StoreService, request: pb.GetLatestResourcesRequest) -> Message:
    update = await service.store.get_latest_resources()
    return pb.GetLatestResourcesResponse(update=None if update is None else codec.update_to_proto(update))


async def get_worker(service: StoreService, request: pb.GetWorkerRequest) -> Message:
    worker = await service.store.get_worker_by_id(request.worker_id)
    return pb.GetWorkerResponse(worker=None if worker is None else codec.worker_to_proto(worker))


async def get_statistics(service: StoreService, request: pb.GetStatisticsRequest) -> Message:
    return codec.statistics_to_proto(await service.store.statistics())


async def get_server_info(service: StoreService, request: pb.GetServerInfoRequest) -> Message:
    return pb.GetServerInfoResponse(
        server_version=_server_version(),
        server_instance_id=service.instance_id,
        store_class=service.store_class,
        capabilities=codec.capabilities_to_proto(served_capabilities(service.store)),
        max_receive_message_bytes=service.limits.max_message_bytes,
        max_send_message_bytes=service.limits.max_message_bytes,
    )


def served_capabilities(store: LightningStore) -> LightningStoreCapabilities:
    """What a store can do with a server before it."""
    return {**store.capabilities, "thread_safe": True, "async_safe": True, "otlp_traces": True}


@cache
def _server_version() -> str:
    return version("agent-lightning-grpc")


# --- Resources, and changing records ---------------------------------------------------------------------------


async def add_resources(service: StoreService, request: pb.AddResourcesRequest) -> Message:
    update = await service.store.add_resources(codec.resources_from_proto(request.resources))
    return pb.AddResourcesResponse(update=codec.update_to_proto(update))


async def update_resources(service: StoreService, request: pb.UpdateResourcesRequest) -> Message:
    resources = codec.resources_from_proto(request.resources)
    update = await service.store.update_resources(request.resources_id, resources)
    return pb.UpdateResourcesResponse(update=codec.update_to_proto(update))


async def update_rollout(service: StoreService, request: pb.UpdateRolloutRequest) -> Message:
    rollout = await service.store.update_rollout(
        request.rollout_id, **codec.rollout_changes_from_proto(request)
    )
    return pb.UpdateRolloutResponse(rollout=codec.rollout_to_proto(rollout))


async def update_attempt(service: StoreService, request: pb.UpdateAttemptRequest) -> Message:
    changes = codec.attempt_changes_from_proto(request)
    attempt = await service.store.update_attempt(request.rollout_id, request.attempt_id, **changes)
    return pb.UpdateAttemptResponse(attempt=codec.attempt_to_proto(attempt))


async def update_worker(service: StoreService, request: pb.UpdateWorkerRequest) -> Message:
    stats: dict[str, Any] | None | Unset = UNSET
    if request.HasField("heartbeat_stats_json"):
        data = request.heartbeat_stats_json
        stats = None if data.strip() == b"null" else decode_object(data, "heartbeat_stats")
    worker = await service.store.update_worker(request.worker_id, stats)
    return pb.UpdateWorkerResponse(worker=codec.worker_to_proto(worker))


async def send_heartbeat(service: StoreService, request: pb.SendHeartbeatRequest) -> Message:
    reply = await service.store.send_heartbeat(codec.heartbeat_from_proto(request.heartbeat))
    return pb.SendHeartbeatResponse(
        worker=codec.worker_to_proto(reply.worker),
        commands=[codec.command_to_proto(command) for command in reply.commands],
    )


async def send_worker_command(service: StoreService, request: pb.SendWorkerCommandRequest) -> Message:
    command = codec.command_from_proto(request.command)
    if command is None:
        raise ValueError(
            "SendWorkerCommandRequest.command is not set, or is one that this server does not know"
        )
    received = await service.store.send_command(command, _worker_id(request))
    return pb.SendWorkerCommandResponse(received=received)


# --- Queries ---------------------------------------------------------------------------------------------------


async def query_rollouts(service: StoreService, request: pb.QueryRolloutsRequest) -> Found:
    result = await service.store.query_rollouts(
        status_in=_words(request, "status_in", codec.ROLLOUT_STATUS),
        rollout_id_in=list(request.rollout_id_in.values) if request.HasField("rollout_id_in") else None,
        rollout_id_contains=_given(request, "rollout_id_contains"),
        filter_logic=_filter_logic(request),
        **codec.page_from_proto(request.page),
    )
    return Found(result, pb.QueryRolloutsResponse, "rollouts", _and_serialise(codec.rollout_to_proto))


async def query_attempts(service: StoreService, request: pb.QueryAttemptsRequest) -> Found:
    result = await service.store.query_attempts(request.rollout_id, **codec.page_from_proto(request.page))
    return Found(result, pb.QueryAttemptsResponse, "attempts", _and_serialise(codec.attempt_to_proto))


_SPAN_CONDITIONS = tuple(
    f"{field}{suffix}"
    for field in ("trace_id", "span_id", "parent_id", "name")
    for suffix in ("", "_contains")
)


async def query_spans(service: StoreService, request: pb.QuerySpansRequest) -> Found:
    store, attempt_id = service.store, _given(request, "attempt_id")
    which: dict[str, Any] = {
        "filter_logic": _filter_logic(request),
        **{name: _given(request, name) for name in _SPAN_CONDITIONS},
        **codec.page_from_proto(request.page),
    }
    if isinstance(store, StoreEngine) and type(store).query_spans is StoreEngine.query_spans:
        # it keeps spans encoded as they are sent
        found = await store.find_span_records(request.rollout_id, attempt_id, SpanQuery.of(**which))
        return Found(found, pb.QuerySpansResponse, "spans", SpanRecord.to_bytes)
    result = await store.query_spans(request.rollout_id, attempt_id, **which)
    return Found(result, pb.QuerySpansResponse, "spans", _and_serialise(codec.span_to_proto))


async def query_resources(service: StoreService, request: pb.QueryResourcesRequest) -> Found:
    result = await service.store.query_resources(
        resources_id=_given(request, "resources_id"),
        resources_id_contains=_given(request, "resources_id_contains"),
        **codec.page_from_proto(request.page),
    )
    return Found(result, pb.QueryResourcesResponse, "updates", _and_serialise(codec.update_to_proto))


async def query_workers(service: StoreService, request: pb.QueryWorkersRequest) -> Found:
    result = await service.store.query_workers(
        status_in=_words(request, "status_in", codec.WORKER_STATUS),
        worker_id_contains=_given(request, "worker_id_contains"),
        filter_logic=_filter_logic(request),
        **codec.page_from_proto(request.page),
    )
    return Found(result, pb.QueryWorkersResponse, "workers", _and_serialise(codec.worker_to_proto))


UNARY_HANDLERS: dict[str, UnaryHandler] = {
    "StartRollout": start_rollout,
    "EnqueueRollouts": enqueue_rollouts,
    "DequeueRollouts": dequeue_rollouts,
    "StartAttempt": start_attempt,
    "UpdateRollout": update_rollout,
    "UpdateAttempt": update_attempt,
    "AddSpans": add_spans,
    "AllocateSpanSequenceIds": allocate_span_sequence_ids,
    "GetRollout": get_rollout,
    "GetLatestAttempt": get_latest_attempt,
    "GetResources": get_resources,
    "GetLatestResources": get_latest_resources,
    "GetWorker": get_worker,
    "AddResources": add_resources,
    "UpdateResources": update_resources,
    "UpdateWorker": update_worker,
    "SendHeartbeat": send_heartbeat,
    "SendWorkerCommand": send_worker_command,
    "WaitForRollouts": wait_for_rollouts,
    "GetStatistics": get_statistics,
    "GetServerInfo": get_server_info,
}

QUERY_HANDLERS: dict[str, QueryHandler] = {
    "QueryRollouts": query_rollouts,
    "QueryAttempts": query_attempts,
    "QuerySpans": query_spans,
    "QueryResources": query_resources,
    "QueryWorkers": query_workers,
}


def _and_serialise(encode: Callable[[Any], Message]) -> Callable[[Any], bytes]:
    return lambda record: encode(record).SerializeToString()


def _given(request: Message, field: str) -> Any:
    return getattr(request, field) if request.HasField(field) else None


def _worker_id(request: Message) -> Any:
    return _given(request, "worker_id")


def _seconds(request: Message, field: str) -> float | None:
    seconds: float | None = _given(request, field)
    return seconds


def _words(request: Message, field: str, table: codec.EnumTable[Any, Any]) -> list[Any] | None:
    if not request.HasField(field):
        return None
    return [table.to_word(number, field) for number in getattr(request, field).values]


def _filter_logic(request: Any) -> Any:
    if request.filter_logic == pb.FILTER_LOGIC_UNSPECIFIED:
        return "and"
    return codec.FILTER_LOGIC.to_word(request.filter_logic, "filter_logic")
