"""Agents: what their parameters are given, and how they travel."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from lightning.agents import Agent, FunctionAgent, as_agent, is_async, rollout
from lightning.types import LLM, Attempt, AttemptedRollout, NamedResources, PromptTemplate, Resource

ROLLOUT = AttemptedRollout(
    rollout_id="ro-1",
    input="task",
    start_time=0,
    attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0),
)
FIRST = PromptTemplate(template="first {x}")
SECOND = PromptTemplate(template="second {x}")
MODEL = LLM(endpoint="http://localhost:8000", model="m")
RESOURCES: NamedResources = {"system": FIRST, "model": MODEL, "user": SECOND}


def given(function: Any, resources: NamedResources = RESOURCES) -> Any:
    return rollout(function).rollout("the task", resources, ROLLOUT)


def test_the_first_parameter_is_the_task_whatever_its_name() -> None:
    assert given(lambda anything: anything) == "the task"
    assert given(lambda rollout: rollout) == "the task"
    assert given(lambda *args: args) == ("the task",)


def test_the_reserved_names_are_the_resources_and_the_rollout() -> None:
    assert given(lambda task, resources, rollout: (resources, rollout)) == (RESOURCES, ROLLOUT)


def test_a_resource_is_asked_for_by_its_name() -> None:
    assert given(lambda task, user, model: (user, model)) == (SECOND, MODEL)


def test_the_first_of_a_well_known_type_is_asked_for_by_the_types_name() -> None:
    assert given(lambda task, prompt_template, llm: (prompt_template, llm)) == (FIRST, MODEL)


def test_a_resource_with_the_name_of_a_type_goes_before_the_first_of_the_type() -> None:
    resources: NamedResources = {"other": FIRST, "prompt_template": SECOND}
    assert given(lambda task, prompt_template: prompt_template, resources) is SECOND


def test_a_parameter_with_a_default_may_go_without() -> None:
    assert given(lambda task, llm=None, missing=3: (llm, missing), {}) == (None, 3)
    assert given(lambda task, llm=None: llm) is MODEL


def test_keyword_only_parameters_are_given_too_and_variable_ones_left_empty() -> None:
    def function(task: str, *rest: Any, user: PromptTemplate, **others: Any) -> Any:
        return rest, user, others

    assert given(function) == ((), SECOND, {})


def test_a_parameter_that_nothing_supplies_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(TypeError) as caught:
        given(lambda task, weights: None)
    message = str(caught.value)
    for part in ("'weights'", "ro-1", "'system' (prompt_template)", "'model' (llm)"):
        assert part in message


@pytest.mark.parametrize(
    "function", [lambda: None, lambda *, task: None, lambda **tasks: None, lambda task, llm, /: None]
)
def test_a_function_that_cannot_be_called_so_is_refused_at_once(function: Any) -> None:
    with pytest.raises(TypeError, match="task as its first parameter|positional-only"):
        rollout(function)


def test_an_agent_can_still_be_called_as_the_function_it_was() -> None:
    @rollout
    def double(task: int) -> int:
        """Twice."""
        return 2 * task

    assert double(4) == 8
    assert double.__name__ == "double"
    assert double.__doc__ == "Twice."
    assert "double" in repr(double)


class Subclass(Agent):
    async def rollout(self, task: Any, resources: NamedResources, rollout: AttemptedRollout) -> float:
        return 1.0


class AsyncCallable:
    async def __call__(self, task: Any) -> None: ...


async def coroutine_function(task: Any) -> None: ...


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (Subclass(), True),
        (coroutine_function, True),
        (AsyncCallable(), True),
        (functools.partial(coroutine_function), True),
        (lambda task: None, False),
        (functools.partial(print, "x"), False),
    ],
)
def test_whether_an_agent_is_async_is_known_before_it_is_called(agent: Any, expected: bool) -> None:
    assert is_async(as_agent(agent)) is expected


@pytest.mark.parametrize(("thing", "words"), [(3, "not 3"), (Subclass, r"pass an agent made of it")])
def test_what_is_no_agent_is_refused(thing: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        as_agent(thing)


def test_an_agent_of_a_module_travels_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_with_agent.py").write_text(
        "import threading\n"
        "from lightning.agents import rollout\n"
        "LOCK = threading.Lock()  # cannot be pickled\n"
        "@rollout\n"
        "def agent(task):\n"
        "    with LOCK:\n"
        "        return float(task)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_with_agent")
    try:
        for pickler in (pickle, cloudpickle):
            assert pickle.loads(pickler.dumps(module.agent)) is module.agent
    finally:
        del sys.modules["module_with_agent"]


def test_an_agent_made_in_a_function_travels_by_value() -> None:
    factor = 3

    @rollout
    def agent(task: int, resources: NamedResources) -> int:
        return factor * task

    copy = pickle.loads(cloudpickle.dumps(agent))
    assert isinstance(copy, FunctionAgent)
    assert copy.rollout(2, {}, ROLLOUT) == 6


def test_a_resource_of_an_own_type_is_given_by_name() -> None:
    resource = Resource(resource_type="somebody's")
    assert given(lambda task, weights: weights, {"weights": resource}) is resource
