"""Adapters: what an algorithm learns from, made of the spans of one attempt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field
from typing_extensions import NotRequired, TypedDict

from lightning.tracing import find_final_reward
from lightning.training.messages import ChatMessage, ModelCall, read_model_calls
from lightning.types import Span

T_co = TypeVar("T_co", covariant=True)


class Adapter(ABC, Generic[T_co]):
    """Turns the spans of one attempt into what an algorithm wants to see.

    ```python
    class CountTools(Adapter[int]):
        def adapt(self, spans):
            return sum(span.name.startswith("tool.") for span in spans)
    ```
    """

    @abstractmethod
    def adapt(self, spans: Sequence[Span]) -> T_co:
        """Convert spans of one attempt, in the order in which `LightningStore.query_spans` returns them.

        Raises:
            ValueError: The spans are not what the adapter is for.
        """


class Triplet(BaseModel):
    """One call of a language model, and what it was worth."""

    prompt: list[ChatMessage]
    """What the model was given: messages in OpenAI's chat form, oldest first."""
    response: ChatMessage
    """What it answered, in the same form."""
    reward: float | None = None
    """None: nobody said."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """`rollout_id`, `attempt_id`, `span_id`, `sequence_id` and `name` of the call's span, and as `attributes` those of
    its attributes that are not in the fields above: model, token usage, token ids, …"""


class TraceToTriplets(Adapter[list[Triplet]]):
    """The model calls of an attempt, each with the reward that followed it: for reinforcement learning.

    Which spans are model calls, `lightning.training.messages` says. A reward belongs to the last call before it, in
    the order of the spans; of several rewards for one call the last counts, as it does for `find_final_reward`.
    Rewards before the first call belong to none.

    Args:
        unrewarded: The reward of calls that nobody rewarded: `"none"` leaves it None, `"final"` takes the attempt's
            final reward, so that every turn of a conversation is worth what came of it.
    """

    def __init__(self, *, unrewarded: Literal["none", "final"] = "none") -> None:
        if unrewarded not in ("none", "final"):
            raise ValueError(f"unrewarded must be 'none' or 'final', not {unrewarded!r}")
        self._unrewarded = unrewarded

    def adapt(self, spans: Sequence[Span]) -> list[Triplet]:
        calls = {call.span.span_id: call for call in read_model_calls(spans)}
        final = find_final_reward(spans) if self._unrewarded == "final" else None
        triplets: list[Triplet] = []
        for span in spans:
            if span.span_id in calls:
                triplets.append(_triplet(calls[span.span_id]))
            elif triplets and (reward := find_final_reward([span])) is not None:
                triplets[-1].reward = reward
        for triplet in triplets:
            if triplet.reward is None:
                triplet.reward = final
        return triplets


def _triplet(call: ModelCall) -> Triplet:
    span = call.span
    return Triplet(
        prompt=call.prompt,
        response=call.response,
        metadata={
            "rollout_id": span.rollout_id,
            "attempt_id": span.attempt_id,
            "span_id": span.span_id,
            "sequence_id": span.sequence_id,
            "name": span.name,
            "attributes": call.other_attributes,
        },
    )


class Conversation(TypedDict):
    """A conversation as files for fine-tuning hold it, one JSON object a line."""

    messages: list[ChatMessage]
    tools: NotRequired[list[Any]]
    """Definitions of the tools that the model was offered; absent if there were none."""


class TraceToMessages(Adapter[list[Conversation]]):
    """The conversations of an attempt in OpenAI's chat form: for supervised fine-tuning.

    Each model call makes one, its prompt and its answer. A call whose whole conversation a later call continues is
    left out, so that a chat of many turns comes once, and an agent that held several chats has them all.
    """

    def adapt(self, spans: Sequence[Span]) -> list[Conversation]:
        kept: list[Conversation] = []
        for call in reversed(read_model_calls(spans)):
            messages = [*call.prompt, call.response]
            if any(later["messages"][: len(messages)] == messages for later in kept):
                continue
            kept.append({"messages": messages, "tools": call.tools} if call.tools else {"messages": messages})
        return kept[::-1]
