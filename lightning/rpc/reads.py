"""The client's verbs that only look: queries and look-ups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.codec.building import build
from lightning.rpc.errors import StoreInternalError
from lightning.store.arguments import ROLLOUT_STATUSES, WORKER_STATUSES
from lightning.store.contract import FilterLogic, LightningStore, SortOrder
from lightning.store.numbers import check_version
from lightning.store.queries import any_suffices, check_members, check_page, check_texts
from lightning.store.texts import check_ids, check_text
from lightning.types import (
    Attempt,
    LightningStoreStatistics,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Span,
    Worker,
    WorkerStatus,
)

T = TypeVar("T")


class RemoteReads(LightningStore):
    """Reads, made of the two kinds of calls that a client has to define."""

    @abstractmethod
    async def _unary(self, method: str, request: bytes, wait: float) -> bytes:
        """Make a call that answers after `wait` seconds at the latest. Requests and answers are serialised."""

    @abstractmethod
    async def _stream(self, method: str, request: bytes, take: Callable[[bytes], T]) -> list[T]:
        """Make a call that has many answers, and return what `take` makes of each."""

    async def _call(self, method: str, request: Message | bytes, wait: float = 0.0) -> Any:
        serialised = request if isinstance(request, bytes) else request.SerializeToString()
        return _parse(method, await self._unary(method, serialised, wait))

    async def statistics(self) -> LightningStoreStatistics:
        return codec.statistics_from_proto(await self._call("GetStatistics", pb.GetStatisticsRequest()))

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        statuses = check_members(status if status_in is None else status_in, ROLLOUT_STATUSES, "status_in")
        ids = rollout_ids if rollout_id_in is None else rollout_id_in
        check_texts(rollout_id_contains=rollout_id_contains)
        request = build(
            pb.QueryRolloutsRequest,
            status_in=None
            if statuses is None
            else pb.RolloutStatusList(
                values=[codec.ROLLOUT_STATUS.to_number(status, "status_in") for status in statuses]
            ),
            rollout_id_in=None
            if ids is None
            else build(pb.StringList, values=check_ids(ids, "rollout_id_in")),
            rollout_id_contains=rollout_id_contains,
            filter_logic=_filter_logic(filter_logic),
            page=_page(sort_by, sort_order, limit, offset),
        )
        return await self._query("QueryRollouts", request, "rollouts", codec.rollout_from_proto)

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        check_text(rollout_id, "rollout_id")
        request = build(
            pb.QueryAttemptsRequest,
            rollout_id=rollout_id,
            page=_page(sort_by, sort_order, limit, offset),
        )
        return await self._query("QueryAttempts", request, "attempts", codec.attempt_from_proto)

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
    ) -> PaginatedResult[Span]:
        check_text(rollout_id, "rollout_id")
        filters = {
            "attempt_id": attempt_id,
            "trace_id": trace_id,
            "trace_id_contains": trace_id_contains,
            "span_id": span_id,
            "span_id_contains": span_id_contains,
            "parent_id": parent_id,
            "parent_id_contains": parent_id_contains,
            "name": name,
            "name_contains": name_contains,
        }
        check_texts(**filters)
        request = build(
            pb.QuerySpansRequest,
            rollout_id=rollout_id,
            **filters,
            filter_logic=_filter_logic(filter_logic),
            page=_page(sort_by, sort_order, limit, offset),
        )
        return await self._query("QuerySpans", request, "spans", codec.span_from_proto)

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        check_texts(resources_id=resources_id, resources_id_contains=resources_id_contains)
        request = build(
            pb.QueryResourcesRequest,
            resources_id=resources_id,
            resources_id_contains=resources_id_contains,
            page=_page(sort_by, sort_order, limit, offset),
        )
        return await self._query("QueryResources", request, "updates", codec.update_from_proto)

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        statuses = check_members(status_in, WORKER_STATUSES, "status_in")
        check_texts(worker_id_contains=worker_id_contains)
        request = build(
            pb.QueryWorkersRequest,
            status_in=None
            if statuses is None
            else pb.WorkerStatusList(
                values=[codec.WORKER_STATUS.to_number(status, "status_in") for status in statuses]
            ),
            worker_id_contains=worker_id_contains,
            filter_logic=_filter_logic(filter_logic),
            page=_page(sort_by, sort_order, limit, offset),
        )
        return await self._query("QueryWorkers", request, "workers", codec.worker_from_proto)

    async def _query(
        self, method: str, request: Message, field: str, decode: Callable[[Any], T]
    ) -> PaginatedResult[T]:
        def take(answer: bytes) -> tuple[pb.PageInfo, list[T]]:
            message = _parse(method, answer)
            return message.page_info, codec.decode_many(decode, getattr(message, field))

        pieces = await self._stream(method, request.SerializeToString(), take)
        return codec.result_from_proto(pieces[0][0], [item for _, items in pieces for item in items])

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        check_text(rollout_id, "rollout_id")
        response = await self._call("GetRollout", build(pb.GetRolloutRequest, rollout_id=rollout_id))
        return codec.rollout_from_proto(response.rollout) if response.HasField("rollout") else None

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        check_text(rollout_id, "rollout_id")
        response = await self._call(
            "GetLatestAttempt", build(pb.GetLatestAttemptRequest, rollout_id=rollout_id)
        )
        return codec.attempt_from_proto(response.attempt) if response.HasField("attempt") else None

    async def get_resources_by_id(
        self, resources_id: str, version: int | None = None
    ) -> ResourcesUpdate | None:
        check_text(resources_id, "resources_id")
        check_version(version)
        request = build(pb.GetResourcesRequest, resources_id=resources_id, version=version)
        return _update(await self._call("GetResources", request))

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return _update(await self._call("GetLatestResources", pb.GetLatestResourcesRequest()))

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        check_text(worker_id, "worker_id")
        response = await self._call("GetWorker", build(pb.GetWorkerRequest, worker_id=worker_id))
        return codec.worker_from_proto(response.worker) if response.HasField("worker") else None


def _page(sort_by: str | None, sort_order: SortOrder, limit: int, offset: int) -> pb.Page:
    check_page(sort_by, sort_order, limit, offset)  # which fields there are to sort by, the store knows
    return codec.page_to_proto(limit=limit, offset=offset, sort_by=sort_by, sort_order=sort_order)


def _filter_logic(filter_logic: FilterLogic) -> pb.FilterLogic.ValueType:
    any_suffices(filter_logic)
    return codec.FILTER_LOGIC.to_number(filter_logic, "filter_logic")


def _update(response: Any) -> ResourcesUpdate | None:
    return codec.update_from_proto(response.update) if response.HasField("update") else None


@cache
def _response_class(method: str) -> type[Message]:
    service = pb.DESCRIPTOR.services_by_name["LightningStoreService"]
    return GetMessageClass(service.methods_by_name[method].output_type)


def _parse(method: str, answer: bytes) -> Any:
    kind = _response_class(method)
    try:
        return kind.FromString(answer)
    except DecodeError:
        raise StoreInternalError(
            f"what the server answered to {method} is not a {kind.DESCRIPTOR.full_name}"
        ) from None
