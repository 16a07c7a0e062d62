"""Rewards as spans."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from lightning.tracing import emit_reward, find_final_reward, find_rewards
from lightning.types import Span


def test_a_reward_is_a_span_under_the_names_that_others_know() -> None:
    span = emit_reward(0.5, attributes={"judge": "me"})
    assert span.name == "agentlightning.annotation"
    assert dict(span.attributes or {}) == {
        "judge": "me",
        "agentlightning.reward.0.name": "primary",
        "agentlightning.reward.0.value": 0.5,
    }
    assert span.end_time is not None


def test_of_several_rewards_the_primary_one_comes_first() -> None:
    span = emit_reward({"style": 0.25, "truth": 1.0}, primary_key="truth")
    assert find_rewards(span) == {"truth": 1.0, "style": 0.25}
    assert list(find_rewards(span)) == ["truth", "style"]
    assert find_final_reward([span]) == 1.0


def test_a_single_named_reward_is_the_primary_one() -> None:
    assert find_rewards(emit_reward({"truth": 1})) == {"truth": 1.0}
    assert find_rewards(emit_reward(2, primary_key="truth")) == {"truth": 2.0}


@pytest.mark.parametrize("primary_key", [None, "beauty"])
def test_several_rewards_need_to_know_the_primary_one(primary_key: str | None) -> None:
    with pytest.raises(ValueError, match=r"primary_key must be one of \['style', 'truth'\]"):
        emit_reward({"style": 0.25, "truth": 1.0}, primary_key=primary_key)


def test_no_reward_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="primary_key"):
        emit_reward({})


@pytest.mark.parametrize("reward", [True, 3, np.float32(0.5), np.int64(2), Fraction(1, 2), math.inf])
def test_every_real_number_is_a_reward(reward: float) -> None:
    assert find_final_reward([emit_reward(reward)]) == float(reward)


@pytest.mark.parametrize("reward", ["1.0", None, 1j])
def test_what_is_no_number_is_no_reward(reward: object) -> None:
    with pytest.raises(TypeError, match="not a number"):
        emit_reward(reward)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'truth'"):
        emit_reward({"truth": reward})  # type: ignore[dict-item]


def test_the_last_reward_is_the_final_one() -> None:
    spans = [emit_reward(1.0), emit_reward(2.0), span_named("something else")]
    assert find_final_reward(spans) == 2.0
    assert find_final_reward(Span.from_opentelemetry(span, "ro", "at", 1) for span in spans[:2]) == 2.0


def test_where_there_is_no_reward_there_is_none() -> None:
    assert find_final_reward([]) is None
    assert find_final_reward([span_named("x")]) is None
    assert find_rewards(span_named("x")) == {}


def span_named(name: str) -> Span:
    return Span(
        rollout_id="ro", attempt_id="at", sequence_id=1, trace_id="1" * 32, span_id="2" * 16, name=name
    )
