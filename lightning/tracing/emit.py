"""Rewards as spans: how an agent reports them, and how an algorithm reads them back.

A reward is a span named `agentlightning.annotation` with the attributes `agentlightning.reward.0.name` and
`agentlightning.reward.0.value`, then `….1.…` and so on for further dimensions; the first one is the primary reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan

from lightning.tracing.provider import own_provider
from lightning.types import Span

ANNOTATION_SPAN_NAME = "agentlightning.annotation"
PRIMARY_REWARD_NAME = "primary"

_PREFIX = "agentlightning.reward"
_INSTRUMENTATION_NAME = "agentlightning"


def emit_reward(
    reward: float | Mapping[str, float],
    *,
    primary_key: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ReadableSpan:
    """Record a reward of the attempt being executed, as a span of no duration under the span that is open now.

    Args:
        reward: The reward, or several by name.
        primary_key: Which of several is the one that `find_final_reward` returns.
        attributes: Further attributes of the span.

    Returns:
        The span. Outside of an attempt it goes nowhere else, so agents can be called by hand.

    Raises:
        TypeError: A reward is not a number.
        ValueError: There are several rewards and `primary_key` does not name one of them, or there is none.
    """
    values = {**(attributes or {}), **_reward_attributes(_by_name(reward, primary_key))}
    # not the global provider, which may be one that samples: a reward must not get lost
    span = (
        own_provider().get_tracer(_INSTRUMENTATION_NAME).start_span(ANNOTATION_SPAN_NAME, attributes=values)
    )
    span.end()
    if not isinstance(span, ReadableSpan):
        raise RuntimeError("OpenTelemetry is switched off (OTEL_SDK_DISABLED): rewards cannot be recorded")
    return span


def find_rewards(span: Span | ReadableSpan) -> dict[str, float]:
    """The rewards that a span holds, by name, the primary one first; empty if it holds none."""
    attributes = span.attributes or {}
    rewards: dict[str, float] = {}
    index = 0
    while isinstance(value := attributes.get(f"{_PREFIX}.{index}.value"), (int, float)):
        name = attributes.get(f"{_PREFIX}.{index}.name", PRIMARY_REWARD_NAME if index == 0 else str(index))
        rewards[str(name)] = float(value)
        index += 1
    return rewards


def find_final_reward(spans: Iterable[Span | ReadableSpan]) -> float | None:
    """The primary reward of the last span that holds one; None if none does.

    Args:
        spans: In the order in which they were recorded, as `query_spans` returns them.
    """
    final = None
    for span in spans:
        rewards = find_rewards(span)
        if rewards:
            final = next(iter(rewards.values()))
    return final


def _by_name(reward: Any, primary_key: str | None) -> dict[str, float]:
    if not isinstance(reward, Mapping):
        return {primary_key or PRIMARY_REWARD_NAME: _number(reward, "the reward")}
    if primary_key is None and len(reward) == 1:
        primary_key = next(iter(reward))
    if primary_key is None or primary_key not in reward:
        raise ValueError(f"primary_key must be one of {sorted(reward)}, not {primary_key!r}")
    names = [primary_key, *(name for name in reward if name != primary_key)]
    return {name: _number(reward[name], f"the reward {name!r}") for name in names}


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{what} is a {type(value).__name__}, not a number")
    return float(value)


def _reward_attributes(rewards: Mapping[str, float]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for index, (name, value) in enumerate(rewards.items()):
        values[f"{_PREFIX}.{index}.name"] = name
        values[f"{_PREFIX}.{index}.value"] = value
    return values
