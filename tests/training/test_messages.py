"""Model calls in every spelling of the conventions come out as the same chat messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning.training.messages import read_model_call, read_model_calls
from lightning.types import Event, Span


def make_span(
    attributes: dict[str, Any] | None = None,
    *,
    events: list[Event] | None = None,
    span_id: int = 1,
    parent_id: int | None = None,
) -> Span:
    return Span(
        rollout_id="ro-1",
        attempt_id="at-1",
        sequence_id=span_id,
        trace_id="0" * 31 + "1",
        span_id=f"{span_id:016x}",
        parent_id=None if parent_id is None else f"{parent_id:016x}",
        name="chat",
        attributes=attributes or {},
        events=events or [],
    )


PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
ANSWER = {"role": "assistant", "content": "4"}

SPELLINGS: dict[str, Span] = {
    "parts": make_span(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief."}]),
            "gen_ai.input.messages": json.dumps(
                [{"role": "user", "parts": [{"type": "text", "content": "2 + 2?"}]}]
            ),
            "gen_ai.output.messages": json.dumps(
                [{"role": "assistant", "parts": [{"type": "text", "content": "4"}], "finish_reason": "stop"}]
            ),
        }
    ),
    "parts on an event": make_span(
        events=[
            Event(
                name="gen_ai.client.inference.operation.details",
                attributes={
                    "gen_ai.input.messages": json.dumps(PROMPT),
                    "gen_ai.output.messages": json.dumps([ANSWER]),
                },
            )
        ]
    ),
    "an event for each message": make_span(
        events=[
            Event(name="gen_ai.system.message", attributes={"content": "Be brief."}),
            Event(name="gen_ai.user.message", attributes={"gen_ai.event.content": '{"content": "2 + 2?"}'}),
            Event(
                name="gen_ai.choice",
                attributes={"index": 0, "finish_reason": "stop", "message": '{"content": "4"}'},
            ),
        ]
    ),
    "numbered attributes": make_span(
        {
            "gen_ai.prompt.0.role": "system",
            "gen_ai.prompt.0.content": "Be brief.",
            "gen_ai.prompt.1.role": "user",
            "gen_ai.prompt.1.content": "2 + 2?",
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": "4",
            "gen_ai.completion.0.finish_reason": "stop",
        }
    ),
    "JSON lists": make_span(
        {"gen_ai.prompt": json.dumps({"messages": PROMPT}), "gen_ai.completion": json.dumps([ANSWER])}
    ),
    "JSON lists on events": make_span(
        events=[
            Event(name="gen_ai.content.prompt", attributes={"gen_ai.prompt": json.dumps(PROMPT)}),
            Event(name="gen_ai.content.completion", attributes={"gen_ai.completion": json.dumps([ANSWER])}),
        ]
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_messages(spelling: str) -> None:
    call = read_model_call(SPELLINGS[spelling])
    assert call is not None
    assert call.prompt == PROMPT
    assert call.response == ANSWER


def test_plain_text_is_a_question_and_an_answer() -> None:
    call = read_model_call(make_span({"gen_ai.prompt": "2 + 2?", "gen_ai.completion": "4"}))
    assert call is not None
    assert call.prompt == [{"role": "user", "content": "2 + 2?"}]
    assert call.response == ANSWER


@pytest.mark.parametrize("text", ['{"answer": 4}', "[1, 2]", "{broken", '["a", "b"]', "[]"])
def test_an_answer_that_looks_like_json_stays_text(text: str) -> None:
    call = read_model_call(make_span({"gen_ai.prompt": text, "gen_ai.completion": text}))
    assert call is not None
    assert call.prompt == [{"role": "user", "content": text}]
    assert call.response == {"role": "assistant", "content": text}


TOOL_CALL = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 2}'},
}


@pytest.mark.parametrize(
    "attributes",
    [
        {
            "gen_ai.input.messages": json.dumps(
                [
                    {
                        "role": "tool",
                        "parts": [{"type": "tool_call_response", "id": "call-0", "response": {"sum": 3}}],
                    }
                ]
            ),
            "gen_ai.output.messages": json.dumps(
                [
                    {
                        "role": "assistant",
                        "parts": [
                            {"type": "tool_call", "id": "call-1", "name": "add", "arguments": {"a": 2}}
                        ],
                    }
                ]
            ),
        },
        {
            "gen_ai.prompt.0.role": "tool",
            "gen_ai.prompt.0.tool_call_id": "call-0",
            "gen_ai.prompt.0.content": '{"sum": 3}',
            "gen_ai.completion.0.tool_calls.0.id": "call-1",
            "gen_ai.completion.0.tool_calls.0.name": "add",
            "gen_ai.completion.0.tool_calls.0.arguments": '{"a": 2}',
        },
        {
            "gen_ai.prompt": json.dumps(
                [{"role": "tool", "tool_call_id": "call-0", "content": '{"sum": 3}'}]
            ),
            "gen_ai.completion": json.dumps([{"role": "assistant", "tool_calls": [TOOL_CALL]}]),
        },
    ],
)
def test_tools_come_in_chat_form(attributes: dict[str, Any]) -> None:
    call = read_model_call(make_span(attributes))
    assert call is not None
    assert call.prompt == [{"role": "tool", "tool_call_id": "call-0", "content": '{"sum": 3}'}]
    assert call.response == {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}


def test_parts_that_chat_has_no_form_for_stay_among_the_content() -> None:
    image = {"type": "blob", "mime_type": "image/png", "content": "aGk="}
    call = read_model_call(
        make_span(
            {
                "gen_ai.input.messages": json.dumps(
                    [{"role": "user", "parts": [{"type": "text", "content": "What is it?"}, image]}]
                ),
                "gen_ai.output.messages": json.dumps([ANSWER]),
            }
        )
    )
    assert call is not None
    assert call.prompt == [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]


def test_messages_are_ordered_by_number_not_by_text() -> None:
    attributes = {f"gen_ai.prompt.{index}.content": str(index) for index in range(12)}
    call = read_model_call(make_span({**attributes, "gen_ai.completion.0.content": "done"}))
    assert call is not None
    assert [message["content"] for message in call.prompt] == [str(index) for index in range(12)]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"gen_ai.prompt": "asked, never answered"},
        {"gen_ai.completion": ""},
        {"gen_ai.operation.name": "invoke_agent", "gen_ai.prompt": "q", "gen_ai.completion": "a"},
        {"gen_ai.operation.name": "execute_tool", "gen_ai.completion": "a"},
    ],
)
def test_other_spans_are_no_calls(attributes: dict[str, Any]) -> None:
    assert read_model_call(make_span(attributes)) is None


@pytest.mark.parametrize(
    ("attributes", "content"),
    [
        ({"gen_ai.completion.0": "no message", "gen_ai.completion.0.role": "user"}, "no message"),
        ({"gen_ai.output.messages": "[null]"}, "[null]"),
        ({"gen_ai.completion": 4}, "4"),
    ],
)
def test_what_is_malformed_is_taken_for_text(attributes: dict[str, Any], content: str) -> None:
    call = read_model_call(make_span(attributes))
    assert call is not None
    assert call.response == {"role": "assistant", "content": content}


def test_of_calls_within_calls_the_innermost_counts() -> None:
    content = {"gen_ai.prompt": "q", "gen_ai.completion": "a"}
    spans = [
        make_span(content, span_id=1, parent_id=3),
        make_span({}, span_id=3, parent_id=5),
        make_span(content, span_id=5),
        make_span(content, span_id=6, parent_id=99),
    ]
    assert [call.span.sequence_id for call in read_model_calls(spans)] == [1, 6]


def test_tools_and_the_other_attributes_are_kept() -> None:
    tools = [{"type": "function", "name": "add"}]
    call = read_model_call(
        make_span(
            {
                "gen_ai.completion": "a",
                "gen_ai.tool.definitions": json.dumps(tools),
                "gen_ai.request.model": "m",
                "response_token_ids": [1, 2],
            }
        )
    )
    assert call is not None
    assert call.tools == tools
    assert call.other_attributes == {"gen_ai.request.model": "m", "response_token_ids": [1, 2]}
