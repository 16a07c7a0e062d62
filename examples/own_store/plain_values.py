"""Checking and copying values, and answering queries: what `plain_store.py` needs beside the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lightning.codec import decode_span, encode_span
from lightning.store.contract import FilterLogic, SortOrder
from lightning.types import (
    Attempt,
    EnqueueRolloutRequest,
    PaginatedResult,
    Resource,
    Rollout,
    RolloutConfig,
    RolloutMode,
    Span,
    Worker,
    decode_payload,
    encode_payload,
    to_json_value,
)

T = TypeVar("T")


def check(condition: bool, problem: str) -> None:
    """Raises `ValueError` saying `problem` unless `condition` holds."""
    if not condition:
        raise ValueError(problem)


def request_of(
    input: Any,
    mode: RolloutMode | None,
    resources_id: str | None,
    config: RolloutConfig | None,
    metadata: dict[str, Any] | None,
) -> EnqueueRolloutRequest:
    """The arguments of `enqueue_rollout` as one value."""
    return EnqueueRolloutRequest.model_construct(
        input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
    )


def check_request(index: int, request: Any) -> None:
    """Refuse what is no request, naming its place."""
    if not isinstance(request, EnqueueRolloutRequest):
        raise TypeError(f"rollouts[{index}] must be an EnqueueRolloutRequest, not {type(request).__name__}")


def checked_config(config: RolloutConfig | None) -> RolloutConfig:
    """A copy of a config that is valid still, or the default."""
    return RolloutConfig() if config is None else RolloutConfig.model_validate(config.model_dump())


def json_object(value: Any, name: str) -> dict[str, Any] | None:
    """A copy of a JSON object, or None. Raises `TypeError` or `ValueError` naming what JSON cannot hold."""
    converted = None if value is None else to_json_value(value, name)
    if converted is not None and not isinstance(converted, dict):
        raise TypeError(f"{name} must be an object, not {type(value).__name__}")
    return converted


def copied_span(span: Span) -> Span:
    """A copy of a span, by way of the product's own encoding, which checks what may stand in it."""
    return decode_span(encode_span(span), span.sequence_id)


def copied_resource(name: Any, resource: Any) -> Resource:
    """A copy of a resource, of the class that is registered for its type."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a resource must be a string, not {name!r}")
    if not isinstance(resource, Resource):
        raise TypeError(f'resources["{name}"] is no Resource')
    data = encode_payload(resource.model_dump(mode="json"), f'resources["{name}"]')
    return Resource.from_fields(decode_payload(data))


def checked_list(values: Sequence[Any] | None, allowed: Sequence[str] | None) -> list[Any] | None:
    """A filter's list of values, of which each must be allowed."""
    if values is None:
        return None
    check(not isinstance(values, str), f"a list is needed, not {values!r}")
    for value in values:
        check(allowed is None or value in allowed, f"no such value: {value!r}")
    return list(values)


def equals(field: str, wanted: str | None) -> Callable[[Any], bool] | None:
    """A condition on a field, if one is wanted."""
    return None if wanted is None else lambda item: bool(getattr(item, field) == wanted)


def contains(field: str, part: str | None) -> Callable[[Any], bool] | None:
    """A condition on a text field, if one is wanted."""
    return None if part is None else lambda item: part in (getattr(item, field) or "")


def filtered(
    items: Iterable[T], filter_logic: FilterLogic, *conditions: Callable[[T], bool] | None
) -> list[T]:
    """Those for which all of the given conditions hold, or any of them."""
    check(filter_logic in ("and", "or"), f"filter_logic must be 'and' or 'or', not {filter_logic!r}")
    given = [condition for condition in conditions if condition is not None]
    join = any if given and filter_logic == "or" else all
    return [item for item in items if join(condition(item) for condition in given)]


def page_of(
    items: Sequence[T], sort_by: str | None, sort_order: SortOrder, limit: int, offset: int
) -> PaginatedResult[T]:
    """Sort, missing values first, and cut."""
    check(sort_order in ("asc", "desc"), f"sort_order must be 'asc' or 'desc', not {sort_order!r}")
    check(limit >= -1, f"limit must be -1 or more, not {limit}")
    check(offset >= 0, f"offset must be 0 or more, not {offset}")
    ordered = list(items)
    if sort_by is not None:
        fields = {"worker_id", "resources_id", "version", "create_time", "update_time"}
        for kind in (Rollout, Attempt, Span, Worker):
            fields |= set(kind.model_fields)
        check(sort_by in fields, f"cannot sort by {sort_by!r}")
        ordered.sort(
            key=lambda item: (getattr(item, sort_by) is not None, getattr(item, sort_by)),
            reverse=sort_order == "desc",
        )
    elif sort_order == "desc":
        ordered.reverse()
    items_on_page = ordered[offset:] if limit < 0 else ordered[offset : offset + limit]
    return PaginatedResult.model_construct(
        items=items_on_page, limit=limit, offset=offset, total=len(ordered)
    )


def copied_page(page: PaginatedResult[Any]) -> PaginatedResult[Any]:
    """A page whose records nobody else has."""
    return page.model_copy(update={"items": [item.model_copy(deep=True) for item in page.items]})
