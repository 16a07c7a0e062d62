"""Agents: what a user writes to be trained."""

from __future__ import annotations

import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce, update_wrapper
from typing import Any

from lightning.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, Resource

_FIRST_OF_TYPE: dict[str, type[Resource]] = {"llm": LLM, "prompt_template": PromptTemplate}


_MAIN_MODULES = ("__main__", "__mp_main__")
"""The program's own module, as it is called in its first process and in one of `multiprocessing`."""


class Agent(ABC):
    """An agent: executes a task and reports how well it did.

    Subclass it, or turn a function into one with `@rollout`. Agents travel to other processes, by dotted path or with
    cloudpickle, so keep what cannot be pickled out of `__init__`.
    """

    @abstractmethod
    def rollout(self, task: Any, resources: NamedResources, rollout: AttemptedRollout) -> Any:
        """Execute one task. Define it with `def` or with `async def`.

        A plain function runs in a thread of its own, so it may block. Whatever it records with OpenTelemetry becomes
        spans of the attempt.

        Args:
            task: The rollout's input.
            resources: The resources it is bound to; empty if there are none.
            rollout: The rollout and its attempt.

        Returns:
            None; or the final reward as a number; or spans (OpenTelemetry's or the store's) to be stored.
        """


class FunctionAgent(Agent):
    """An agent made of a function, which it can still be called as. See `rollout`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._parameters = _supplied_parameters(function)
        update_wrapper(self, function)
        self.is_async = _is_coroutine_function(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<agent {_name(self._function)}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        module = getattr(self._function, "__module__", None) or "__main__"
        qualname = getattr(self._function, "__qualname__", "")
        if module not in _MAIN_MODULES and _find(sys.modules.get(module), qualname) is self:
            return _load, (module, qualname)  # by name, so that the module's globals need not be picklable
        return FunctionAgent, (self._function,)

    def rollout(self, task: Any, resources: NamedResources, rollout: AttemptedRollout) -> Any:
        """Call the function with what it asks for by name."""
        arguments = {}
        for parameter in self._parameters:
            try:
                arguments[parameter.name] = _supply(parameter.name, resources, rollout)
            except LookupError:
                if parameter.default is inspect.Parameter.empty:
                    raise TypeError(self._missing(parameter.name, resources, rollout)) from None
        return self._function(task, **arguments)

    def _missing(self, name: str, resources: NamedResources, rollout: AttemptedRollout) -> str:
        there = ", ".join(f"{key!r} ({value.resource_type})" for key, value in resources.items()) or "none"
        return (
            f"{self!r} needs {name!r}, which rollout {rollout.rollout_id} does not supply; "
            f"besides 'resources' and 'rollout' there are the resources: {there}"
        )


def rollout(function: Callable[..., Any]) -> FunctionAgent:
    """Make a function, plain or `async`, an agent.

    Its first parameter is the task. Further ones are given what their name says: `resources` (all of them, by name),
    `rollout` (the `AttemptedRollout`), the resource of that name, `llm` (the first `LLM`), `prompt_template` (the first
    `PromptTemplate`). One that has a default may go without. What it returns is explained at `Agent.rollout`.

    ```python
    @rollout
    async def agent(task, prompt_template):
        answer = await ask(prompt_template.format(question=task["question"]))
        return 1.0 if answer == task["answer"] else 0.0
    ```

    Raises:
        TypeError: The function takes no task, or has a parameter that cannot be given by name.
    """
    return FunctionAgent(function)


def as_agent(agent: Agent | Callable[..., Any]) -> Agent:
    """`agent` itself, or the function made one.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(agent, Agent):
        return agent
    if isinstance(agent, type) and issubclass(agent, Agent):
        raise TypeError(f"{agent.__name__} is a class: pass an agent made of it, {agent.__name__}(…)")
    if not callable(agent):
        raise TypeError(f"an agent is an Agent or a function decorated with @rollout, not {agent!r}")
    return FunctionAgent(agent)


def is_async(agent: Agent) -> bool:
    """Whether the agent's code runs on the event loop."""
    return agent.is_async if isinstance(agent, FunctionAgent) else _is_coroutine_function(agent.rollout)


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # an object whose call is a coroutine function
    )


def _name(function: Callable[..., Any]) -> str:
    qualname = getattr(function, "__qualname__", None)
    return repr(function) if qualname is None else f"{function.__module__}:{qualname}"


def _supplied_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters after the task."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C, and does not tell: it can take the task at most
        return []
    task, others = (parameters[0], parameters[1:]) if parameters else (None, [])
    name = _name(function)
    if task is None or task.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise TypeError(f"an agent takes the task as its first parameter, but {name} has no positional one")
    for parameter in others:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"parameter {parameter.name!r} of {name} is positional-only and cannot be given by name"
            )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter for parameter in others if parameter.kind not in variable]


def _supply(name: str, resources: NamedResources, rollout: AttemptedRollout) -> Any:
    """The value of an agent's parameter; raises `LookupError` if there is none."""
    if name == "resources":
        return resources
    if name == "rollout":
        return rollout
    if name in resources:
        return resources[name]
    kind = _FIRST_OF_TYPE.get(name)
    for resource in resources.values():
        if kind is not None and isinstance(resource, kind):
            return resource
    raise LookupError(name)


def _find(module: Any, qualname: str) -> Any:
    return reduce(lambda found, name: getattr(found, name, None), qualname.split("."), module)


def _load(module: str, qualname: str) -> Any:
    found = _find(importlib.import_module(module), qualname)
    if found is None:
        raise AttributeError(f"module {module!r} has no {qualname!r}")
    return found
