"""The execution of one attempt: resources, agent, trace, result — and its interruption."""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace import ReadableSpan

from lightning.agents import is_async
from lightning.backoff import STORE_AWAY, Backoff
from lightning.runner.threads import CallEnded
from lightning.runner.waiting import unless
from lightning.tracing import AttemptTrace, emit_reward
from lightning.types import UNSET, AttemptedRollout, AttemptStatus, NamedResources, Span

if TYPE_CHECKING:
    from lightning.runner.agent import AgentRunner

logger = logging.getLogger(__name__)

_LAST_SPANS_SECONDS = 5.0
"""How long the spans of an interrupted attempt may keep a runner when the store is out of reach."""
_LAST_REPORT_SECONDS = 2.0
"""The same for its report, if there is one to make."""
_MAX_MESSAGE_CHARS = 2000
_MAX_TRACEBACK_CHARS = 8000
_TRACEBACK_FRAMES = 12


@dataclass(frozen=True)
class Interruption:
    """Why an attempt must not go on."""

    reason: str
    report: AttemptStatus | None
    """The status to close the attempt with; None if the store closed it already."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended in this runner."""

    error: BaseException | None = None
    """What the agent raised, or the preparation of its call."""
    interruption: Interruption | None = None
    """Set if it was stopped before it was done."""


class _AgentFailed(Exception):
    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class AttemptExecution:
    """Executes one attempt for a runner. To be used on the runner's event loop only.

    Args:
        runner: On whose behalf.
        rollout: The claimed rollout.
    """

    def __init__(self, runner: AgentRunner, rollout: AttemptedRollout) -> None:
        self.rollout = rollout
        self._runner = runner
        self._agent = runner.agent
        self._loop = asyncio.get_running_loop()
        self._interruption: Interruption | None = None
        self._interrupted = asyncio.Event()
        self._stop_agent: Callable[[], None] | None = None
        self._given_up: asyncio.Future[None] = self._loop.create_future()

    @property
    def attempt_id(self) -> str:
        """The attempt being executed."""
        return self.rollout.attempt.attempt_id

    def interrupt(self, reason: str, report: AttemptStatus | None = None) -> None:
        """Stop the agent's code, wherever it is. Only the first interruption counts.

        If the code does not end within the runner's `interrupt_grace`, it is left behind.

        Args:
            reason: For people who read logs.
            report: The status to close the attempt with; None if the store closed it already.
        """
        if self._interruption is not None:
            return
        logger.info("attempt %s is interrupted: %s", self.attempt_id, reason)
        self._interruption = Interruption(reason, report)
        self._interrupted.set()
        self._loop.call_later(self._runner.interrupt_grace, self._give_up)
        if self._stop_agent is not None:
            self._stop_agent()

    async def run(self) -> Outcome:
        """Execute the attempt to its end, and report the result."""
        hooks = self._runner.hooks
        context: dict[str, Any] = {"agent": self._agent, "runner": self._runner, "rollout": self.rollout}
        await hooks.rollout_start(**context)
        try:
            outcome, lost = await self._run_traced(context)
            await self._report(outcome, lost)
        finally:
            await hooks.rollout_end(**context, spans=await self._spans_for_hooks())
        return outcome

    async def _run_traced(self, context: dict[str, Any]) -> tuple[Outcome, dict[str, int]]:
        """Call the agent within a trace; returns how that ended, and how many spans did not reach the store."""
        hooks, tracer = self._runner.hooks, self._runner.tracer
        async with tracer.trace(
            self._runner.store,
            self.rollout.rollout_id,
            self.attempt_id,
            run=self._runner.run_upkeep,
            close_timeout=_LAST_SPANS_SECONDS,
        ) as trace:
            await hooks.trace_start(**context, tracer=tracer)
            try:
                outcome = await self._attempt(trace)
            finally:
                await hooks.trace_end(**context, tracer=tracer)
            # whom the result wakes will read the spans at once
            await unless(self._interrupted, trace.flush())
        lost = {"spans_dropped": trace.dropped, "spans_refused": trace.refused}
        return outcome, {name: count for name, count in lost.items() if count}

    # --- The agent's part --------------------------------------------------------------------------------------

    async def _attempt(self, trace: AttemptTrace) -> Outcome:
        timeout = self.rollout.config.timeout_seconds
        # The store watches the time too, and normally is the first, as its clock started earlier; if it can be reached.
        timer = timeout and self._loop.call_later(
            timeout, self.interrupt, f"it took longer than {timeout} s", "timeout"
        )
        try:
            resources = await unless(self._interrupted, self._fetch_resources())
            if resources is not None and self._interruption is None:
                value = await self._call_agent(resources)
                if self._interruption is None:
                    _record(value, trace)
        except _AgentFailed as failure:
            if self._interruption is None:
                return self._failed(failure.error)
        except Exception as error:  # noqa: BLE001  # of the preparation, or of what was returned: the attempt fails
            return self._failed(error)
        finally:
            self._stop_agent = None
            if timer:
                timer.cancel()
        return Outcome(interruption=self._interruption)

    def _failed(self, error: BaseException) -> Outcome:
        logger.warning("attempt %s failed", self.attempt_id, exc_info=error)
        return Outcome(error=error)

    async def _fetch_resources(self) -> NamedResources:
        """What the rollout is bound to; asked for each time, so it is never out of date."""
        resources_id = self.rollout.resources_id
        if resources_id is None:
            return {}
        backoff = Backoff()
        while True:
            try:
                update = await self._runner.store.get_resources_by_id(resources_id)
                break
            except STORE_AWAY as error:
                backoff.log_first(logger, "attempt %s waits for its resources: %s", self.attempt_id, error)
                await backoff.sleep()
        if update is None:
            raise LookupError(f"the resources {resources_id!r} of the rollout do not exist")
        return update.resources

    async def _call_agent(self, resources: NamedResources) -> Any:
        """What the agent returns. Raises `_AgentFailed` if it raises anything."""
        arguments = (self.rollout.input, resources, self.rollout)
        if is_async(self._agent):
            return await self._finish(self._agent.rollout(*arguments))
        thread = self._runner.threads.take()
        try:
            call = thread.call(lambda: self._agent.rollout(*arguments), copy_context())
            value = await self._await(call, lambda: thread.interrupt(call))
        finally:
            self._runner.threads.give_back(thread)
        return await self._finish(value) if inspect.isawaitable(value) else value

    async def _finish(self, awaitable: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(_contained(awaitable))
        return await self._await(task, task.cancel)

    async def _await(self, code: asyncio.Future[Any], stop: Callable[[], object]) -> Any:
        """The outcome of the agent's code, which `stop` interrupts."""
        self._stop_agent = lambda: (stop(), None)[1]
        if self._interruption is not None:  # between two steps of the agent's code
            stop()
        try:
            await asyncio.wait({code, self._given_up}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            stop()
            raise
        finally:
            if not code.done():
                self._runner.leave_behind(code)
        if not code.done():
            logger.error(
                "attempt %s: the agent's code did not stop within %s s; it is left behind",
                self.attempt_id,
                self._runner.interrupt_grace,
            )
            return None
        if code.cancelled():
            raise _AgentFailed(asyncio.CancelledError("the agent's code was cancelled, not by the runner"))
        error = code.exception()
        if error is not None:
            raise _AgentFailed(error.cause if isinstance(error, CallEnded) else error)
        return code.result()

    def _give_up(self) -> None:
        if not self._given_up.done():
            self._given_up.set_result(None)

    # --- The result --------------------------------------------------------------------------------------------

    async def _report(self, outcome: Outcome, lost: dict[str, int]) -> None:
        status: AttemptStatus = "succeeded" if outcome.error is None else "failed"
        metadata: dict[str, Any] = {**lost}
        if outcome.interruption is not None:
            if outcome.interruption.report is None:
                return  # it is the store that ended it
            status = outcome.interruption.report
            metadata["interrupted"] = outcome.interruption.reason
        if outcome.error is not None:
            metadata["error"] = describe_error(outcome.error)
        if await unless(self._interrupted, self._send_report(status, metadata)):
            return
        try:
            await asyncio.wait_for(self._send_report(status, metadata), _LAST_REPORT_SECONDS)
        except asyncio.TimeoutError:
            logger.error("attempt %s: its result %r cannot be reported", self.attempt_id, status)

    async def _send_report(self, status: AttemptStatus, metadata: dict[str, Any]) -> bool:
        """Close the attempt; tries as long as the store is out of reach. Returns True, as nothing else is left."""
        backoff = Backoff()
        known = self.rollout.attempt.metadata or {}
        while True:
            try:
                await self._runner.store.update_attempt(
                    self.rollout.rollout_id,
                    self.attempt_id,
                    status=status,
                    metadata={**known, **metadata} if metadata else UNSET,
                )
            except STORE_AWAY as error:
                backoff.log_first(
                    logger, "attempt %s: its result waits for the store: %s", self.attempt_id, error
                )
                await backoff.sleep()
            except Exception:
                logger.exception("attempt %s: its result %r was refused", self.attempt_id, status)
                return True
            else:
                return True

    async def _spans_for_hooks(self) -> Sequence[Span]:
        if not self._runner.hooks.want_spans:
            return ()
        try:
            return list(await self._runner.store.query_spans(self.rollout.rollout_id, self.attempt_id))
        except Exception:
            logger.exception("attempt %s: its spans cannot be read for the hooks", self.attempt_id)
            return ()


def describe_error(error: BaseException) -> dict[str, str]:
    """An error as JSON: its type, its message and the end of its traceback."""
    frames = traceback.format_exception(type(error), error, error.__traceback__, limit=-_TRACEBACK_FRAMES)
    return {
        "type": type(error).__qualname__,
        "message": _valid_text(str(error))[:_MAX_MESSAGE_CHARS],
        "traceback": _valid_text("".join(frames))[-_MAX_TRACEBACK_CHARS:],
    }


def _valid_text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


async def _contained(awaitable: Awaitable[Any]) -> Any:
    """Await it; an agent that wants to exit fails, instead of taking the runner with it."""
    try:
        return await awaitable
    except (SystemExit, GeneratorExit) as error:
        raise CallEnded(error) from error


def _record(value: Any, trace: AttemptTrace) -> None:
    """Store what the agent returned. Raises `TypeError` if it is nothing that an agent may return."""
    if value is None:
        return
    if isinstance(value, Real):
        emit_reward(float(value))
    elif isinstance(value, (list, tuple)) and all(isinstance(item, (ReadableSpan, Span)) for item in value):
        for span in value:
            trace.put(span)
    else:
        raise TypeError(
            f"the agent returned a {type(value).__name__}; it may return None, the final reward as a number, "
            "or a list of spans"
        )
