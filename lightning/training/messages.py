"""Calls of language models, read from spans by OpenTelemetry's conventions for generative AI, in all their spellings.

Where the conventions, and the instrumentations that follow them, put what was said:

| spelling | where |
|---|---|
| since 1.37 | `gen_ai.input.messages`, `gen_ai.output.messages`, `gen_ai.system_instructions`: JSON with `parts` |
| 1.28 to 1.36 | an event for each message: `gen_ai.user.message`, …, `gen_ai.choice` |
| numbered attributes | `gen_ai.prompt.0.role`, `gen_ai.prompt.0.content`, …, `gen_ai.completion.0.content` |
| until 1.27 | `gen_ai.prompt`, `gen_ai.completion`: text, or a JSON list of messages |

Whatever it was, it comes out in the form of OpenAI's chat completions: `{"role": …, "content": …}`, with `tool_calls`
and `tool_call_id` where tools are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.types import Event, Span

ChatMessage = dict[str, Any]
"""One message in OpenAI's chat form."""

MODEL_OPERATIONS = frozenset({"chat", "text_completion", "generate_content"})
"""Values of `gen_ai.operation.name` that mean a call of a model, and not of an agent or a tool."""

_CONTENT_EVENTS = frozenset(
    {"gen_ai.content.prompt", "gen_ai.content.completion", "gen_ai.client.inference.operation.details"}
)
"""Events that carry content in attributes which may as well stand on the span itself."""

_MESSAGE_EVENTS = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
_MESSAGE_KEYS = frozenset({"role", "content", "parts", "message", "tool_calls"})
_CHOICE_EVENT = "gen_ai.choice"

_CONTENT_PREFIXES = (
    "gen_ai.prompt",
    "gen_ai.completion",
    "gen_ai.input.messages",
    "gen_ai.output.messages",
    "gen_ai.system_instructions",
    "gen_ai.tool.definitions",
)


@dataclass(frozen=True)
class ModelCall:
    """One call of a language model."""

    span: Span
    prompt: list[ChatMessage]
    """What the model was given, oldest first."""
    response: ChatMessage
    """What it answered; of several choices the first."""
    tools: list[Any]
    """Definitions of the tools that it was offered, as the instrumentation recorded them."""

    @property
    def other_attributes(self) -> dict[str, Any]:
        """The span's attributes without those that the other fields were read from."""
        return {
            name: value
            for name, value in self.span.attributes.items()
            if not name.startswith(_CONTENT_PREFIXES)
        }


def read_model_calls(spans: Sequence[Span]) -> list[ModelCall]:
    """The model calls among `spans`, in their order.

    A span is one if it says what the model answered, and does not say that it is something else than a model call.
    Frameworks wrap the calls of the clients they use in spans of their own: of calls within calls, the innermost
    count, so nothing comes twice.
    """
    calls = [call for span in spans if (call := read_model_call(span)) is not None]
    parents = {span.span_id: span.parent_id for span in spans}
    wrappers: set[str] = set()
    for call in calls:
        above = call.span.parent_id
        while above is not None and above not in wrappers:
            wrappers.add(above)
            above = parents.get(above)
    return [call for call in calls if call.span.span_id not in wrappers]


def read_model_call(span: Span) -> ModelCall | None:
    """The model call that `span` records; None if it records none, or none that was answered."""
    attributes = dict(span.attributes)
    for event in span.events:
        if event.name in _CONTENT_EVENTS:
            attributes.update(event.attributes)
    if attributes.get("gen_ai.operation.name", "chat") not in MODEL_OPERATIONS:
        return None
    prompt = _messages(attributes, ("gen_ai.input.messages", "gen_ai.prompt"), "user")
    answers = _messages(attributes, ("gen_ai.output.messages", "gen_ai.completion"), "assistant")
    prompt = prompt or _event_messages(span.events, _MESSAGE_EVENTS)
    answers = answers or _event_messages(span.events, {_CHOICE_EVENT: "assistant"})
    if not answers:
        return None
    instructions = _parts_messages("system", _from_json(attributes.get("gen_ai.system_instructions")))
    tools = _from_json(attributes.get("gen_ai.tool.definitions"))
    return ModelCall(
        span=span,
        prompt=[*instructions, *prompt],
        response=answers[0],
        tools=tools if isinstance(tools, list) else [],
    )


def _messages(attributes: Mapping[str, Any], names: Sequence[str], role: str) -> list[ChatMessage]:
    """The messages under the first of `names` that has any; `role` is that of text without one."""
    for name in names:
        value = _decoded(attributes[name]) if name in attributes else _numbered(attributes, f"{name}.")
        items = value if isinstance(value, (list, tuple)) else [value]
        messages = [message for item in items for message in _chat_messages(item, role)]
        if messages:
            return messages
    return []


def _event_messages(events: Sequence[Event], roles: Mapping[str, str]) -> list[ChatMessage]:
    messages: list[ChatMessage] = []
    for event in events:
        if event.name in roles:
            body = _from_json(event.attributes.get("gen_ai.event.content"))
            fields = body if isinstance(body, Mapping) else {}
            structures = {
                name: _from_json(event.attributes[name])
                for name in ("message", "tool_calls")
                if name in event.attributes
            }
            messages += _chat_messages({**event.attributes, **structures, **fields}, roles[event.name])
    return messages


def _chat_messages(item: Any, role: str) -> list[ChatMessage]:
    """One recorded message; in chat form it can be several, since there each tool's answer is one of its own."""
    if item is None or item == "":
        return []
    if not isinstance(item, Mapping):
        return [{"role": role, "content": item if isinstance(item, str) else json.dumps(item)}]
    if isinstance(item.get("message"), Mapping):  # a choice, which holds its message beside the finish reason
        item = {**item["message"], "finish_reason": item.get("finish_reason")}
    role = str(item.get("role") or role)
    if isinstance(item.get("parts"), list):
        return _parts_messages(role, item["parts"])
    message: ChatMessage = {"role": role, "content": item.get("content")}
    if isinstance(calls := item.get("tool_calls"), list) and calls:
        message["tool_calls"] = [_tool_call(call) for call in calls if isinstance(call, Mapping)]
    if identifier := item.get("tool_call_id") or (item.get("id") if role == "tool" else None):
        message["tool_call_id"] = identifier
    if message["content"] is None and "tool_calls" not in message:
        return []
    return [message]


def _parts_messages(role: str, parts: Any) -> list[ChatMessage]:
    """A message made of parts. Parts that chat has no form for stay as they are, among the content."""
    if isinstance(parts, str):
        return [{"role": role, "content": parts}]
    content: list[Any] = []
    calls: list[Any] = []
    answers: list[ChatMessage] = []
    for part in parts if isinstance(parts, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_call":
            calls.append(_tool_call(part))
        elif kind == "tool_call_response":
            answer = part.get("response", part.get("result"))
            answers.append({"role": "tool", "tool_call_id": part.get("id"), "content": _as_text(answer)})
        elif kind == "text":
            content.append({"type": "text", "text": str(part.get("content", part.get("text", "")))})
        else:
            content.append(part)
    if not content and not calls:
        return answers
    message: ChatMessage = {"role": role, "content": _join(content)}
    if calls:
        message["tool_calls"] = calls
    return [message, *answers]


def _join(content: list[Any]) -> Any:
    """Text alone is a string, anything else a list of parts, nothing is None."""
    if all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in content):
        return "".join(part["text"] for part in content) or None
    return content


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    inner: Mapping[str, Any] = function if isinstance(function, Mapping) else call
    arguments = inner.get("arguments")
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {
            "name": inner.get("name"),
            "arguments": _as_text({} if arguments is None else arguments),
        },
    }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _decoded(value: Any) -> Any:
    """The message or messages that `value` spells as JSON; else `value`, for an answer may itself be JSON text."""
    structure = _from_json(value)
    if isinstance(structure, Mapping) and isinstance(structure.get("messages"), list):
        structure = structure["messages"]
    items = structure if isinstance(structure, list) else [structure]
    if items and all(isinstance(item, Mapping) and _MESSAGE_KEYS & item.keys() for item in items):
        return items
    return value


def _from_json(value: Any) -> Any:
    """Structures travel as JSON text in attributes; text that is no JSON object or array is just text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _numbered(attributes: Mapping[str, Any], prefix: str) -> Any:
    """`{"p.0.role": "user", "p.0.tool_calls.0.name": …}` as `[{"role": "user", "tool_calls": [{"name": …}]}]`."""
    tree: dict[str, Any] = {}
    for name, value in attributes.items():
        if name.startswith(prefix):
            *steps, last = name[len(prefix) :].split(".")
            node = tree
            for step in steps:
                below = node.setdefault(step, {})
                node = below if isinstance(below, dict) else {}
            node[last] = value
    return _lists(tree)


def _lists(tree: Any) -> Any:
    """Dicts whose keys are all numbers, as lists in the order of the numbers."""
    if not isinstance(tree, dict):
        return tree
    if all(key.isdecimal() for key in tree):
        return [_lists(tree[key]) for key in sorted(tree, key=int)]
    return {key: _lists(value) for key, value in tree.items()}
