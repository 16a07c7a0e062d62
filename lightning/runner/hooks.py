"""Hooks: code of the user's that runs around each rollout."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.agents import Agent
from lightning.types import AttemptedRollout, Span

if TYPE_CHECKING:
    from lightning.runner.agent import AgentRunner
    from lightning.tracing import OtelTracer

logger = logging.getLogger(__name__)


class Hook:
    """Override what you need. Hooks observe: one that raises is logged, and changes nothing for the rollout.

    Every hook that was started is ended too, whatever becomes of the attempt, and in the reverse order.
    """

    async def on_rollout_start(self, *, agent: Agent, runner: AgentRunner, rollout: AttemptedRollout) -> None:
        """A rollout was claimed; nothing has been done for it yet."""

    async def on_trace_start(
        self, *, agent: Agent, runner: AgentRunner, tracer: OtelTracer, rollout: AttemptedRollout
    ) -> None:
        """Spans are recorded from now on, also those made here; the agent is called next."""

    async def on_trace_end(
        self, *, agent: Agent, runner: AgentRunner, tracer: OtelTracer, rollout: AttemptedRollout
    ) -> None:
        """The agent is done; spans made here are still recorded."""

    async def on_rollout_end(
        self, *, agent: Agent, runner: AgentRunner, rollout: AttemptedRollout, spans: Sequence[Span]
    ) -> None:
        """The attempt is over, and its result reported; `spans` are those that the store has of it."""


class Hooks:
    """Some hooks, called as one."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise TypeError(f"a hook must be a Hook, not {hook!r}")
        self._hooks = tuple(hooks)

    @property
    def want_spans(self) -> bool:
        """Whether any hook looks at the spans at the end, so that they must be read from the store."""
        return any(type(hook).on_rollout_end is not Hook.on_rollout_end for hook in self._hooks)

    async def rollout_start(self, **context: Any) -> None:
        await self._call([hook.on_rollout_start for hook in self._hooks], context)

    async def trace_start(self, **context: Any) -> None:
        await self._call([hook.on_trace_start for hook in self._hooks], context)

    async def trace_end(self, **context: Any) -> None:
        await self._call([hook.on_trace_end for hook in reversed(self._hooks)], context)

    async def rollout_end(self, **context: Any) -> None:
        await self._call([hook.on_rollout_end for hook in reversed(self._hooks)], context)

    async def _call(self, calls: Sequence[Callable[..., Awaitable[None]]], context: dict[str, Any]) -> None:
        for call in calls:
            try:
                await call(**context)
            except Exception:
                logger.exception("%s failed for rollout %s", _describe(call), context["rollout"].rollout_id)


def _describe(call: Callable[..., Any]) -> str:
    return f"{type(getattr(call, '__self__', None)).__name__}.{getattr(call, '__name__', call)}"
