"""How messages and records are built: fast when all is well, with an error that names the field when it is not."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel

from lightning.types import decode_payload, encode_payload

MessageT = TypeVar("MessageT", bound=Message)
ModelT = TypeVar("ModelT", bound=BaseModel)

_set = object.__setattr__


def build(kind: type[MessageT], **fields: Any) -> MessageT:
    """Make a message; a field that is None stays unset.

    Raises:
        TypeError: A value is of another type than its field. The message names the field.
        ValueError: A number is out of its field's range, or a text holds a lone surrogate.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            _try_field(kind, name, value)
        raise


def _try_field(kind: type[Message], name: str, value: Any) -> None:
    try:
        kind(**{name: value})
    except UnicodeEncodeError:
        raise ValueError(
            f"{kind.__name__}.{name} holds a lone surrogate, which is not valid Unicode text"
        ) from None
    except TypeError:
        raise TypeError(f"{kind.__name__}.{name} cannot be a {type(value).__name__}") from None
    except ValueError:
        raise ValueError(f"{kind.__name__}.{name} is out of range: {value!r}") from None


def construct(model: type[ModelT], fields: dict[str, Any], extra: dict[str, Any] | None = None) -> ModelT:
    """Make a record of fields that are known to be valid, complete, and in the model's order.

    Does what `model_construct` does for models without aliases and private attributes, five times as fast, since it
    need not look for defaults.
    """
    record = model.__new__(model)
    _set(record, "__dict__", fields)
    _set(record, "__pydantic_fields_set__", set(fields))
    _set(record, "__pydantic_extra__", extra)
    _set(record, "__pydantic_private__", None)
    return record


def encode_object(value: Any, name: str) -> bytes | None:
    """Encode a JSON object, or None for "none".

    Raises:
        TypeError: `value` is neither, or holds what is no JSON value.
        ValueError: As `encode_payload`.
    """
    if value is None:
        return None
    data = encode_payload(value, name)
    if not data.startswith(b"{"):
        raise TypeError(f"{name} must be a JSON object (a dict), not {type(value).__name__}")
    return data


def decode_object(data: bytes, name: str) -> dict[str, Any]:
    """Decode a JSON object. Raises `ValueError` if `data` holds anything else."""
    value = decode_payload(data, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object")
    return value
