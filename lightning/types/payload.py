"""The rules for free-form payloads: what `input`, `metadata` and `heartbeat_stats` may hold.

A payload is a JSON value. It is checked and encoded once, where it enters the product, and travels and rests as
UTF-8 JSON text from then on: exact for integers of any size, distinct for `1` and `1.0`, native in every language.
Pydantic models and dataclasses become objects, tuples become arrays; everything else is refused with the path of the
offending value, before anything is stored.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from pydantic import BaseModel

JsonValue = Any
"""None, bool, int, float, str, or lists and string-keyed dicts of these; not spelled out, for recursive aliases cost
every caller a cast."""

MAX_NESTING_DEPTH = 200
"""Levels of lists and objects a payload may have: well inside what JSON parsers of other languages accept."""

_MAX_INTEGER_BITS = 4096
"""Larger integers hit Python's guard against quadratic int/str conversion (`sys.set_int_max_str_digits`)."""

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)

PathStep = str | int


def encode_payload(value: Any, name: str) -> bytes:
    """Check `value` and encode it as UTF-8 JSON.

    Args:
        value: What the user handed in.
        name: What the user calls it (`"input"`, `"metadata"`): the start of the path in error messages.

    Raises:
        TypeError: A value of a type that JSON does not have, such as a set or an arbitrary object.
        ValueError: NaN or an infinity, a lone surrogate, a key that is not a string, nesting deeper than
            `MAX_NESTING_DEPTH`, or an integer of more than 4096 bits.
    """
    return _encoder.encode(to_json_value(value, name)).encode("utf-8")


def decode_payload(data: bytes, name: str = "payload") -> JsonValue:
    """Decode UTF-8 JSON into a fresh value that nothing else refers to.

    Raises:
        ValueError: `data` is not UTF-8 JSON, or holds NaN or an infinity. `name` says what it was.
    """
    try:
        value = _decoder.decode(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    return value


def validate_encoded_payload(data: bytes, name: str) -> bytes:
    """Check UTF-8 JSON that another program encoded, and return it in this product's own encoding.

    Raises:
        ValueError: As `encode_payload` and `decode_payload`.
    """
    return encode_payload(decode_payload(data, name), name)


def to_json_value(value: Any, name: str) -> JsonValue:
    """Return `value` as plain JSON data, sharing no mutable part with it. Raises as `encode_payload` does."""
    return _convert(value, (name,))


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
"""One for all: `json.loads` makes a decoder for each call that gives it a `parse_constant`."""


def _convert(value: Any, path: tuple[PathStep, ...]) -> JsonValue:
    kind = type(value)
    if kind is str:
        return _text(value, path)
    if value is None or kind is bool:
        return value
    if kind is int:
        return _integer(value, path)
    if kind is float:
        return _real(value, path)
    if len(path) > MAX_NESTING_DEPTH:
        raise ValueError(f"{path_text(path[:4])}… is nested deeper than {MAX_NESTING_DEPTH} levels")
    if kind is dict:
        return {_key(key, path): _convert(item, (*path, key)) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_convert(item, (*path, index)) for index, item in enumerate(value)]
    return _convert_other(value, path)


def _convert_other(value: Any, path: tuple[PathStep, ...]) -> JsonValue:
    """The rarer cases: models, dataclasses and subclasses of the JSON types (an `IntEnum`, a `defaultdict`)."""
    if isinstance(value, BaseModel):
        # by python-mode dump, so that what JSON cannot hold is refused here instead of being turned into a string
        return _convert(dict(value.model_dump(mode="python")), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _convert(fields, path)
    if isinstance(value, str):
        return _text(str.__str__(value), path)
    if isinstance(value, int):
        return _integer(int(value), path)
    if isinstance(value, float):
        return _real(float(value), path)
    if isinstance(value, dict):
        return _convert(dict(value), path)
    if isinstance(value, (list, tuple)):
        return _convert(list(value), path)
    raise TypeError(f"{path_text(path)} is a {type(value).__name__}, which is not a JSON value")


def _key(key: Any, path: tuple[PathStep, ...]) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{path_text(path)} has the key {key!r}; keys must be strings")
    return _text(str.__str__(key), (*path, key))


def _text(value: str, path: tuple[PathStep, ...]) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{path_text(path)} holds a lone surrogate, which is not valid Unicode text"
        ) from None
    return value


def _integer(value: int, path: tuple[PathStep, ...]) -> int:
    if value.bit_length() > _MAX_INTEGER_BITS:
        raise ValueError(f"{path_text(path)} is an integer of more than {_MAX_INTEGER_BITS} bits")
    return value


def _real(value: float, path: tuple[PathStep, ...]) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{path_text(path)} is {value!r}, which is not a JSON value")
    return value


def path_text(path: tuple[PathStep, ...]) -> str:
    """`("input", "a", 3)` as `input["a"][3]`."""
    head, *rest = path
    steps = "".join(f"[{json.dumps(step)}]" if isinstance(step, str) else f"[{step}]" for step in rest)
    return f"{head}{steps}"
