"""Span attributes: Python values to typed messages and back, exactly.

What OpenTelemetry knows is taken: text, bool, 64-bit integers, floats, bytes, null, and sequences and string-keyed maps
of these. Sequences come back as lists, and everything else as the type it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightningpb.v1 import span_pb2

from lightning.types import Attributes
from lightning.types.payload import PathStep, path_text

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

MAX_ATTRIBUTE_DEPTH = 24
"""Levels of sequences and maps: what still fits into the 100 levels of messages that protobuf parsers accept."""


_LENGTH_DELIMITED = 2
_LEVELS = bytes(
    field << 3 | _LENGTH_DELIMITED | continued
    for field in (
        span_pb2.AttributeValue.ARRAY_VALUE_FIELD_NUMBER,
        span_pb2.AttributeValue.KVLIST_VALUE_FIELD_NUMBER,
    )
    for continued in (0, 0x80)
)
"""The first byte of what stands before a sequence and before a map; a tag may be longer than it need be."""
_QUICK_LOOK_BYTES = 4096
"""To count in more than this takes as long as to look at the attributes."""
_SCALARS = frozenset({"string_value", "bool_value", "int_value", "double_value", "bytes_value"})


class _Refused(Exception):
    """A value that cannot be an attribute; collects the path to it on the way up."""

    def __init__(self, kind: type[Exception], problem: str) -> None:
        super().__init__(problem)
        self.kind = kind
        self.problem = problem
        self.steps: list[PathStep] = []

    def under(self, step: PathStep) -> _Refused:
        self.steps.append(step)
        return self

    def to_error(self, name: str) -> Exception:
        return self.kind(f"{path_text((name, *reversed(self.steps)))} {self.problem}")


def write_attributes(
    target: RepeatedCompositeFieldContainer[span_pb2.Attribute], attributes: Mapping[str, Any], name: str
) -> None:
    """Append `attributes` to a message's field.

    Args:
        target: The field.
        attributes: Values by name.
        name: What the user calls the attributes: the start of the path in error messages.

    Raises:
        TypeError: A value of a type that OpenTelemetry does not have.
        ValueError: A key that is not a string, an integer that does not fit into 64 bits, a lone surrogate, or nesting
            deeper than `MAX_ATTRIBUTE_DEPTH`.
    """
    try:
        _write_map(target, attributes, 0)
    except _Refused as refused:
        raise refused.to_error(name) from None


def read_attributes(source: RepeatedCompositeFieldContainer[span_pb2.Attribute]) -> Attributes:
    """The attributes as a dict of their own; of two with one key, the later counts."""
    attributes: Attributes = {}
    # what makes this loop fast: a copy of the container, which is a list, and a direct look at scalars, which most are
    for attribute in source[:]:
        value = attribute.value
        member = value.WhichOneof("value")
        attributes[attribute.key] = (
            getattr(value, member) if member in _SCALARS else _read_nested(value, member)
        )
    return attributes


def may_be_too_deep(encoded: bytes) -> bool:
    """Whether a serialised message could hold attributes that `check_attributes` refuses.

    Most could not, which is found without looking at any attribute: on the wire each level of nesting begins with a
    byte for the field that holds it, so there are no more levels than such bytes, wherever these come from.

    Args:
        encoded: The message, as protobuf serialises it.
    """
    if len(encoded) > _QUICK_LOOK_BYTES:
        return True
    return len(encoded) - len(encoded.translate(None, _LEVELS)) > MAX_ATTRIBUTE_DEPTH


def check_attributes(source: RepeatedCompositeFieldContainer[span_pb2.Attribute], name: str) -> None:
    """Check that what `read_attributes` returns could be written again: raises `ValueError` if it is too deep."""
    for attribute in source:
        value = attribute.value
        # most are scalars; a direct look is what makes this loop fast
        if value.WhichOneof("value") not in _SCALARS and _nesting(value) > MAX_ATTRIBUTE_DEPTH:
            raise ValueError(f"{name} are nested deeper than {MAX_ATTRIBUTE_DEPTH} levels")


def _nesting(source: span_pb2.AttributeValue) -> int:
    member = source.WhichOneof("value")
    if member == "array_value":
        return 1 + max(map(_nesting, source.array_value.values), default=0)
    if member == "kvlist_value":
        return 1 + max((_nesting(inner.value) for inner in source.kvlist_value.attributes), default=0)
    return 0


def _write_map(
    target: RepeatedCompositeFieldContainer[span_pb2.Attribute], values: Mapping[Any, Any], depth: int
) -> None:
    for key, value in values.items():
        attribute = target.add()
        try:
            attribute.key = key
        except TypeError:
            raise _Refused(ValueError, f"has the key {key!r}; keys must be strings") from None
        except UnicodeEncodeError:
            raise _Refused(ValueError, f"has the key {key!r}, which holds a lone surrogate") from None
        try:
            _write_value(attribute.value, value, depth)
        except _Refused as refused:
            raise refused.under(key) from None


def _write_value(target: span_pb2.AttributeValue, value: Any, depth: int) -> None:
    kind = type(value)
    if kind is str:
        try:
            target.string_value = value
        except UnicodeEncodeError:
            raise _Refused(ValueError, "holds a lone surrogate, which is not valid Unicode text") from None
    elif kind is float:
        target.double_value = value
    elif kind is bool:
        target.bool_value = value
    elif kind is int:
        try:
            target.int_value = value
        except ValueError:
            raise _Refused(ValueError, f"is {value}, which does not fit into 64 bits") from None
    elif kind is list or kind is tuple:
        _write_sequence(target, value, depth + 1)
    elif value is None:
        target.SetInParent()
    else:
        _write_other(target, value, depth)


def _write_sequence(target: span_pb2.AttributeValue, values: Any, depth: int) -> None:
    _check_depth(depth)
    target.array_value.SetInParent()
    elements = target.array_value.values
    for index, value in enumerate(values):
        try:
            _write_value(elements.add(), value, depth)
        except _Refused as refused:
            raise refused.under(index) from None


def _write_other(target: span_pb2.AttributeValue, value: Any, depth: int) -> None:
    """The rarer types, and subclasses of the common ones (an `IntEnum`, a `numpy.float64`)."""
    if isinstance(value, (bytes, bytearray)):
        target.bytes_value = bytes(value)
    elif isinstance(value, Mapping):
        _check_depth(depth + 1)
        target.kvlist_value.SetInParent()
        _write_map(target.kvlist_value.attributes, value, depth + 1)
    elif isinstance(value, str):
        _write_value(target, str.__str__(value), depth)
    elif isinstance(value, int):
        _write_value(target, int(value), depth)
    elif isinstance(value, float):
        _write_value(target, float(value), depth)
    elif isinstance(value, (list, tuple)):
        _write_sequence(target, value, depth + 1)
    else:
        raise _Refused(
            TypeError, f"is a {type(value).__name__}, which is not a type of OpenTelemetry's attributes"
        )


def _check_depth(depth: int) -> None:
    if depth > MAX_ATTRIBUTE_DEPTH:
        raise _Refused(ValueError, f"is nested deeper than {MAX_ATTRIBUTE_DEPTH} levels")


def _read_member(source: span_pb2.AttributeValue) -> Any:
    member = source.WhichOneof("value")
    return getattr(source, member) if member in _SCALARS else _read_nested(source, member)


def _read_nested(source: span_pb2.AttributeValue, member: str | None) -> Any:
    if member == "array_value":
        return [_read_member(value) for value in source.array_value.values]
    if member == "kvlist_value":
        return read_attributes(source.kvlist_value.attributes)
    return None  # no member is set: null
