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


def as_list(values: Iterable[T], name: str) -> list[T]:
    """`values` as a list. Raises `ValueError` for a string, which is one of its characters too, but never meant so."""
    if isinstance(values, str):
        shown = values if len(values) <= 200 else f"{values[:200]}…"
        raise ValueError(f"{name} must be a list, not the string {shown!r}")
    return list(values)


def check_ids(ids: Iterable[Any], name: str) -> list[str]:
    """`ids` as a list. Raises `TypeError` naming the element that is no string, and `ValueError` as `as_list`."""
    return [check_text(id_, f"{name}[{index}]") for index, id_ in enumerate(as_list(ids, name))]
