"""Spans survive the wire exactly, and what cannot travel is refused by its path."""

from __future__ import annotations

import copy
import enum
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightningpb.v1 import span_pb2, store_service_pb2

from lightning.codec import (
    MAX_ATTRIBUTE_DEPTH,
    check_span,
    decode_span,
    encode_span,
    span_from_proto,
    span_to_proto,
)
from lightning.codec.attributes import may_be_too_deep
from lightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HEX = st.text("0123456789abcdef", min_size=16, max_size=16)
TIMES = st.none() | st.floats()
SCALARS = (
    st.none()
    | TEXT
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=True)
    | st.binary(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
ATTRIBUTES = st.dictionaries(TEXT, VALUES, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CONTEXTS = st.builds(
    SpanContext,
    trace_id=HEX | st.just(""),
    span_id=HEX | st.just(""),
    is_remote=st.booleans(),
    trace_state=st.dictionaries(TEXT, TEXT, max_size=4),
)
EXTRA = st.dictionaries(st.sampled_from(["kind", "dropped_events", "x.y", "é"]), JSON, max_size=3)
SPANS = st.builds(
    lambda extra, **fields: Span(**fields, **extra),
    EXTRA,
    rollout_id=TEXT,
    attempt_id=TEXT,
    sequence_id=st.integers(0, 2**63 - 1),
    trace_id=HEX,
    span_id=HEX,
    parent_id=st.none() | HEX,
    name=TEXT,
    status=st.builds(
        TraceStatus, status_code=st.sampled_from(["UNSET", "OK", "ERROR"]), description=st.none() | TEXT
    ),
    attributes=ATTRIBUTES,
    events=st.lists(st.builds(Event, name=TEXT, attributes=ATTRIBUTES, timestamp=TIMES), max_size=2),
    links=st.lists(st.builds(Link, context=CONTEXTS, attributes=st.none() | ATTRIBUTES), max_size=2),
    start_time=TIMES,
    end_time=TIMES,
    context=st.none() | CONTEXTS,
    parent=st.none() | CONTEXTS,
    resource=st.builds(OtelResource, attributes=ATTRIBUTES, schema_url=TEXT),
)


def make_span(**fields: Any) -> Span:
    basics = {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "sequence_id": 0,
        "trace_id": "t",
        "span_id": "s",
        "name": "n",
    }
    return Span(**{**basics, **fields})


def over_the_wire(span: Span) -> Span:
    return span_from_proto(span_pb2.Span.FromString(span_to_proto(span).SerializeToString()))


def exact(value: Any) -> Any:
    """The value with all its types spelled out and all orders kept: equal only for what is the same to the last bit."""
    if isinstance(value, (list, tuple)):
        return ["list", *map(exact, value)]
    if isinstance(value, dict):
        return ["dict", *((exact(key), exact(item)) for key, item in value.items())]
    if isinstance(value, float):
        return ["float", "nan" if math.isnan(value) else value.hex()]
    return [type(value).__name__, value]


@given(SPANS)
def test_a_span_comes_back_exactly(span: Span) -> None:
    back = over_the_wire(span)
    assert exact(back.model_dump()) == exact(span.model_dump())
    assert back.model_fields_set >= set(Span.model_fields)
    Span.model_validate(back.model_dump())


@given(SPANS, st.integers(1, 2**63 - 1))
def test_a_stored_span_comes_back_under_its_number(span: Span, number: int) -> None:
    back = decode_span(encode_span(span), number)
    assert exact(back.model_dump()) == exact({**span.model_dump(), "sequence_id": number})


def test_a_decoded_span_is_a_full_record() -> None:
    back = over_the_wire(make_span(kind="CLIENT"))
    assert back == make_span(kind="CLIENT")
    assert back.kind == "CLIENT"  # type: ignore[attr-defined]
    back.name = "renamed"
    assert back.model_copy(deep=True).name == "renamed"
    assert Span.model_validate_json(back.model_dump_json()) == back


def test_all_fields_of_a_decoded_span_were_set() -> None:
    names = set(Span.model_fields)
    assert over_the_wire(make_span()).model_fields_set == names
    assert over_the_wire(make_span()).model_dump(exclude_unset=True).keys() == names
    back = over_the_wire(make_span())
    assert back.model_dump(exclude_unset=True) == back.model_dump()
    for copied in (copy.copy(back), copy.deepcopy(back), pickle.loads(pickle.dumps(back))):
        assert copied == back
        assert copied.model_fields_set == names
    back.further = 1  # type: ignore[attr-defined]
    assert back.model_fields_set == {*names, "further"}
    with pytest.raises(AttributeError, match="'Span' object has no attribute 'another'"):
        _ = back.another  # type: ignore[attr-defined]


def test_decoded_spans_share_nothing() -> None:
    message = span_to_proto(make_span(attributes={"a": [1]}))
    first, second = span_from_proto(message), span_from_proto(message)
    first.attributes["a"].append(2)
    first.events.append(Event(name="e"))
    first.further = 1  # type: ignore[attr-defined]
    assert second == make_span(attributes={"a": [1]})
    assert "further" not in second.model_fields_set | span_from_proto(message).model_fields_set


@pytest.mark.parametrize(
    "value", [1, 1.0, True, "1", b"1", None, [], [1, 1.0, True], {"k": []}, -0.0, 2**63 - 1, -(2**63)]
)
def test_types_are_kept_apart(value: Any) -> None:
    assert exact(over_the_wire(make_span(attributes={"a": value})).attributes["a"]) == exact(value)


def test_subclasses_become_the_type_they_extend() -> None:
    class Level(enum.IntEnum):
        HIGH = 3

    class Name(str):
        __slots__ = ()

    class Real(float):
        pass

    attributes = {"i": Level.HIGH, "s": Name("n"), "f": Real(0.5), "t": (1, 2), "b": bytearray(b"x")}
    expected = {"i": 3, "s": "n", "f": 0.5, "t": [1, 2], "b": b"x"}
    assert exact(over_the_wire(make_span(attributes=attributes)).attributes) == exact(expected)


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"k": value}
    return value


REFUSED: list[tuple[dict[Any, Any], type[Exception], str]] = [
    (
        {"a": [0, 1, 2, {5}]},
        TypeError,
        'attributes["a"][3] is a set, which is not a type of OpenTelemetry\'s attributes',
    ),
    ({"a": object()}, TypeError, 'attributes["a"] is a object'),
    ({"a": {"b": [1j]}}, TypeError, 'attributes["a"]["b"][0] is a complex'),
    ({"a": 2**63}, ValueError, 'attributes["a"] is 9223372036854775808, which does not fit into 64 bits'),
    ({"a": [-(2**63) - 1]}, ValueError, 'attributes["a"][0] is -9223372036854775809'),
    ({"a": "\ud800"}, ValueError, 'attributes["a"] holds a lone surrogate'),
    ({"a": {1: 2}}, ValueError, 'attributes["a"] has the key 1; keys must be strings'),
    ({"a": {"\ud800": 2}}, ValueError, "holds a lone surrogate"),
    ({"a": nested(MAX_ATTRIBUTE_DEPTH + 1, "list")}, ValueError, "is nested deeper than 24 levels"),
    ({"a": nested(MAX_ATTRIBUTE_DEPTH + 1, "dict")}, ValueError, "is nested deeper than 24 levels"),
]


@pytest.mark.parametrize(("attributes", "error", "message"), REFUSED)
def test_what_is_no_attribute_is_refused_by_its_path(
    attributes: dict[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        span_to_proto(make_span(attributes=attributes))
    assert message in str(caught.value)
    assert caught.type is error


def test_the_path_says_where_in_the_span_the_attributes_are() -> None:
    bad = {"a": {1}}
    context = SpanContext(trace_id="t", span_id="s")
    for span, path in (
        (make_span(events=[Event(name="e"), Event(name="e", attributes=bad)]), 'events[1].attributes["a"]'),
        (make_span(links=[Link(context=context, attributes=bad)]), 'links[0].attributes["a"]'),
        (make_span(resource=OtelResource(attributes=bad)), 'resource.attributes["a"]'),
    ):
        with pytest.raises(TypeError) as caught:
            span_to_proto(span)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_the_deepest_allowed_attribute_can_be_parsed_in_every_message_that_holds_spans(kind: str) -> None:
    value = nested(MAX_ATTRIBUTE_DEPTH, kind)
    link = Link(context=SpanContext(trace_id="t", span_id="s"), attributes={"a": value})
    message = span_to_proto(make_span(links=[link]))
    batch = store_service_pb2.StreamSpansRequest.Batch(batch_sequence=1, spans=[message])
    request = store_service_pb2.StreamSpansRequest(batch=batch)
    parsed = store_service_pb2.StreamSpansRequest.FromString(request.SerializeToString())
    assert span_from_proto(parsed.batch.spans[0]).links == [link]


def deepened(value: span_pb2.AttributeValue) -> span_pb2.AttributeValue:
    """One level more than can be written."""
    return span_pb2.AttributeValue(array_value=span_pb2.AttributeArray(values=[value]))


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize(
    "place", ["attributes", "events.attributes", "links.attributes", "resource.attributes"]
)
def test_a_message_is_refused_only_if_its_attributes_are_nested_too_deep(kind: str, place: str) -> None:
    attributes = {"a": nested(MAX_ATTRIBUTE_DEPTH, kind)}
    message = span_to_proto(
        make_span(
            attributes=attributes,
            events=[Event(name="e", attributes=attributes)],
            links=[Link(context=SpanContext(trace_id="t", span_id="s"), attributes=attributes)],
            resource=OtelResource(attributes=attributes),
        )
    )
    check_span(message, message.SerializeToString())
    value = {
        "attributes": message.attributes,
        "events.attributes": message.events[0].attributes,
        "links.attributes": message.links[0].attributes.attributes,
        "resource.attributes": message.resource.attributes,
    }[place][0].value
    value.CopyFrom(deepened(value))
    with pytest.raises(ValueError, match=f"{place} are nested deeper than {MAX_ATTRIBUTE_DEPTH} levels"):
        check_span(message, message.SerializeToString())


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_the_quick_look_at_a_message_lets_no_deep_one_pass(kind: str) -> None:
    message = span_to_proto(make_span(attributes={"a": nested(MAX_ATTRIBUTE_DEPTH, kind)}))
    value = message.attributes[0].value
    value.CopyFrom(deepened(value))
    assert may_be_too_deep(message.SerializeToString())
    assert may_be_too_deep(encode_span(make_span(name="x" * 5_000)))
    assert not may_be_too_deep(encode_span(make_span(attributes={"a": [1, {"b": "x" * 1_000}]})))


def test_further_fields_must_be_json() -> None:
    with pytest.raises(TypeError, match=r'span\["kind"\]\[1\] is a set'):
        span_to_proto(make_span(kind=[0, {1}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "Span.name cannot be a int"),
        ({"start_time": "now"}, "Span.start_time cannot be a str"),
        (
            {"context": SpanContext.model_construct(trace_id="t", span_id=5)},
            "SpanContext.span_id cannot be a int",
        ),
        ({"status": TraceStatus.model_construct(description=5)}, "SpanStatus.description cannot be a int"),
    ],
)
def test_fields_of_the_wrong_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        span_to_proto(make_span().model_copy(update=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_id": -1}, "Span.sequence_id is negative: -1"),
        ({"sequence_id": 2**63}, "Span.sequence_id is out of range: 9223372036854775808"),
        ({"name": "\ud800"}, "Span.name holds a lone surrogate"),
        (
            {"events": [Event.model_construct(name="\ud800", attributes={}, timestamp=None)]},
            "SpanEvent.name holds a lone",
        ),
    ],
)
def test_values_that_no_span_can_have_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_to_proto(make_span().model_copy(update=change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_id": -1}, "Span.sequence_id is negative: -1"),
        ({"status": {"code": 99}}, "Span.status.code has the unknown enum number 99"),
        ({"status": {"code": 0}}, "Span.status.code is not set"),
        ({"extra_json": b"[1]"}, "Span.extra_json must be a JSON object"),
        ({"extra_json": b"{"}, "Span.extra_json is not valid JSON"),
        ({"extra_json": b'{"name": "n"}'}, "Span.extra_json holds name, which the span has fields for"),
    ],
)
def test_a_message_that_is_no_span_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_from_proto(span_pb2.Span(**fields))


def test_an_empty_message_is_a_span_with_defaults() -> None:
    span = span_from_proto(span_pb2.Span(name="n", attributes=[span_pb2.Attribute(key="k")]))
    assert span == Span(
        rollout_id="", attempt_id="", sequence_id=0, trace_id="", span_id="", name="n", attributes={"k": None}
    )
