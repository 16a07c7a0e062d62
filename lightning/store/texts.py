"""Checking texts, such as ids, that callers hand in. Like `numbers`, it stands below the contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.types import to_json_value

T = TypeVar("T")


def check_text(text: Any, name: str) -> str:
    """Raises `TypeError` unless `text` is a string, and `ValueError` unless it is valid Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, not {type(text).__name__}")
    if not text.isascii():
        to_json_value(text, name)
    return text


def check_worker_id(worker_id: Any, required: bool = False) -> Any:
    """Raises `ValueError` unless `worker_id` is a name, or None where none is `required`."""
    if worker_id is None and not required:
        return None
    if not isinstance(worker_id, str) or not worker_id:
        raise ValueError(f"worker_id must be a non-empty string, not {worker_id!r}")
    return check_text(worker_id, "worker_id")


def as_list(values: Iterable[T], name: str) -> list[T]:
    """`values` as a list. Raises `ValueError` for a string, which is one of its characters too, but never meant so."""
    if isinstance(values, str):
        shown = values if len(values) <= 200 else f"{values[:200]}…"
        raise ValueError(f"{name} must be a list, not the string {shown!r}")
    return list(values)


def check_ids(ids: Iterable[Any], name: str) -> list[str]:
    """`ids` as a list. Raises `TypeError` naming the element that is no string, and `ValueError` as `as_list`."""
    return [check_text(id_, f"{name}[{index}]") for index, id_ in enumerate(as_list(ids, name))]
