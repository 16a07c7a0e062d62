"""What the built-in adapters make of a trace."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning.training.adapter import TraceToMessages, TraceToTriplets
from lightning.types import Span


class Trace:
    """Spans of one attempt, numbered as they are added."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, name: str, attributes: dict[str, Any]) -> Trace:
        number = len(self.spans) + 1
        self.spans.append(
            Span(
                rollout_id="ro-1",
                attempt_id="at-1",
                sequence_id=number,
                trace_id="0" * 31 + "1",
                span_id=f"{number:016x}",
                name=name,
                attributes=attributes,
            )
        )
        return self

    def call(self, answer: str, *prompt: tuple[str, str], **more: Any) -> Trace:
        messages = [{"role": role, "content": content} for role, content in prompt]
        return self.add(
            "chat", {"gen_ai.prompt": json.dumps(messages), "gen_ai.completion": answer, "model": "m", **more}
        )

    def reward(self, value: float) -> Trace:
        return self.add("agentlightning.annotation", {"agentlightning.reward.0.value": value})


def test_a_reward_belongs_to_the_last_call_before_it() -> None:
    trace = (
        Trace().reward(9.0).call("a").reward(0.1).reward(0.2).call("b").call("c").add("tool", {}).reward(1.0)
    )
    triplets = TraceToTriplets().adapt(trace.spans)
    assert [triplet.response["content"] for triplet in triplets] == ["a", "b", "c"]
    assert [triplet.reward for triplet in triplets] == [0.2, None, 1.0]


def test_calls_without_reward_may_take_the_final_one() -> None:
    trace = Trace().call("a").call("b").reward(0.0).call("c").reward(0.5)
    assert [t.reward for t in TraceToTriplets(unrewarded="final").adapt(trace.spans)] == [0.5, 0.0, 0.5]
    unrewarded = Trace().call("a")
    assert [t.reward for t in TraceToTriplets(unrewarded="final").adapt(unrewarded.spans)] == [None]


def test_a_triplet_says_where_it_comes_from() -> None:
    [triplet] = TraceToTriplets().adapt(Trace().call("a", ("user", "q"), response_token_ids=[5, 6]).spans)
    assert triplet.prompt == [{"role": "user", "content": "q"}]
    assert triplet.metadata == {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "span_id": "0000000000000001",
        "sequence_id": 1,
        "name": "chat",
        "attributes": {"model": "m", "response_token_ids": [5, 6]},
    }


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unrewarded must be 'none' or 'final', not 'all'"):
        TraceToTriplets(unrewarded="all")  # type: ignore[arg-type]


def test_no_calls_make_no_triplets_and_no_conversations() -> None:
    spans = Trace().add("tool", {}).reward(1.0).spans
    assert TraceToTriplets().adapt(spans) == []
    assert TraceToMessages().adapt(spans) == []


def test_a_chat_of_many_turns_comes_once_and_other_chats_too() -> None:
    trace = (
        Trace()
        .call("a1", ("user", "q1"))
        .call("x", ("user", "something else"))
        .call("a2", ("user", "q1"), ("assistant", "a1"), ("user", "q2"))
        .call("a2", ("user", "q1"), ("assistant", "other"), ("user", "q2"))
    )
    conversations = TraceToMessages().adapt(trace.spans)
    assert [[message["content"] for message in c["messages"]] for c in conversations] == [
        ["something else", "x"],
        ["q1", "a1", "q2", "a2"],
        ["q1", "other", "q2", "a2"],
    ]
    assert all("tools" not in conversation for conversation in conversations)


def test_tools_go_with_the_conversation() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    trace = Trace().call("a", ("user", "q"), **{"gen_ai.tool.definitions": json.dumps(tools)})
    [conversation] = TraceToMessages().adapt(trace.spans)
    assert conversation.get("tools") == tools
