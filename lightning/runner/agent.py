"""The runner: claims rollouts, has an agent execute them, and reports what came of it."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from lightning.agents import Agent, as_agent
from lightning.backoff import STORE_AWAY, Backoff
from lightning.runner.attempt import AttemptExecution, Outcome
from lightning.runner.claiming import Claims, attempt_ref
from lightning.runner.heartbeat import Heartbeat
from lightning.runner.hooks import Hook, Hooks
from lightning.runner.threads import BlockingThreads
from lightning.runner.waiting import StopEvent, unless, watching
from lightning.store.contract import LightningStore
from lightning.store.forwarding import complete
from lightning.store.threaded import LoopThread
from lightning.tracing import OtelTracer
from lightning.types import (
    AttemptedRollout,
    AttemptRef,
    CancelAttempt,
    Drain,
    NamedResources,
    Rollout,
    RolloutMode,
    Stop,
    WorkerCommand,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

COMMAND_WAIT_SECONDS = 30.0
"""How long one call listens at the store for commands; the next follows at once."""
_START_WAIT_SECONDS = 2.0
"""How long `start` waits for the first heartbeat to arrive."""
_LAST_HEARTBEAT_SECONDS = 1.0

HeartbeatLaunchMode = Literal["thread", "asyncio"]
_Ending = Literal["drain", "event", "stop"]


class AgentRunner:
    """Executes rollouts with an agent, up to `concurrency` at a time.

    An attempt that is cancelled or runs out of time is interrupted in the agent's code: an `async` agent by
    cancellation, a plain function by an `AgentInterrupted` raised in its thread. While the store is out of reach the
    runner keeps trying; work in hand goes on, and its spans and results wait.

    Args:
        store: Where work comes from.
        agent: What executes it: an `Agent` or a function. Without one the runner can only heartbeat.
        worker_id: Its name; two with one name are one worker. Default: a fresh `worker-…`.
        tracer: Records what the agent does.
        hooks: Called around each rollout.
        concurrency: How many rollouts to execute at a time.
        max_rollouts: `run` returns after so many; None: no limit.
        heartbeat_interval: Seconds between two heartbeats.
        interval_jitter: Seconds by which an interval varies at random, at most.
        heartbeat_launch_mode: Where the runner's own work goes on (heartbeats, listening for commands, sending spans):
            `"thread"`: on an event loop in a thread of its own, so that an agent which blocks the runner's event loop
            keeps its lease; the store must be thread-safe. `"asyncio"`: on the runner's event loop. Default: in a
            thread, if the store is thread-safe.
        heartbeat_include_gpu: Whether heartbeats measure GPUs.
        interrupt_grace: Seconds to wait for interrupted code to end before the next task is taken; it is left behind
            then, and may go on cleaning up.
        stop_grace: Seconds that rollouts have to end by themselves when the event given to `run` is set.

    Raises:
        TypeError: `agent` or a hook is none.
        ValueError: A number is out of range, or the launch mode is unknown or does not suit the store.
    """

    def __init__(
        self,
        *,
        store: LightningStore,
        agent: Agent | Callable[..., Any] | None = None,
        worker_id: str | None = None,
        tracer: OtelTracer | None = None,
        hooks: Sequence[Hook] = (),
        concurrency: int = 1,
        max_rollouts: int | None = None,
        heartbeat_interval: float = 10.0,
        interval_jitter: float = 0.5,
        heartbeat_launch_mode: HeartbeatLaunchMode | None = None,
        heartbeat_include_gpu: bool = False,
        interrupt_grace: float = 1.0,
        stop_grace: float = 2.0,
    ) -> None:
        _check_at_least(1, concurrency=concurrency, max_rollouts=max_rollouts)
        _check_at_least(
            0, interval_jitter=interval_jitter, interrupt_grace=interrupt_grace, stop_grace=stop_grace
        )
        if worker_id == "":
            raise ValueError("worker_id must not be empty")
        if not 0 < heartbeat_interval < math.inf:
            raise ValueError(f"heartbeat_interval must be positive, not {heartbeat_interval!r}")
        self.store = complete(store)
        self.tracer = tracer or OtelTracer()
        self.hooks = Hooks(hooks)
        self.worker_id = f"worker-{uuid.uuid4().hex}" if worker_id is None else worker_id
        self.instance_id = uuid.uuid4().hex
        """Names this runner among those that have the same `worker_id`, before or beside it."""
        self.interrupt_grace = interrupt_grace
        self.threads = BlockingThreads(f"lightning-{self.worker_id}")
        """Where agents that are plain functions run."""
        self._agent = None if agent is None else as_agent(agent)
        self._concurrency = concurrency
        self._max_rollouts = max_rollouts
        self._heartbeat_interval = heartbeat_interval
        self._interval_jitter = interval_jitter
        self._include_gpu = heartbeat_include_gpu
        self._launch_mode = _launch_mode(heartbeat_launch_mode, self.store)
        self._stop_grace = stop_grace
        self._executions: dict[str, AttemptExecution] = {}
        self._claims = Claims(
            self.store,
            self.worker_id,
            self.instance_id,
            known=self._executions.keys(),
            still_held=self._still_held,
        )
        self._left_behind: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._upkeep: LoopThread | None = None
        self._heartbeat: Heartbeat | None = None
        self._background: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Outcome]] = set()
        self._ending: _Ending | None = None
        self._wind_down = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Lock()

    @property
    def agent(self) -> Agent:
        """What executes the rollouts. Raises `RuntimeError` if the runner was given none."""
        return self._require_agent()

    def get_worker_id(self) -> str:
        """The name under which the store knows this runner, given or made: `worker_id`."""
        return self.worker_id

    def _require_agent(self) -> Agent:
        if self._agent is None:
            raise RuntimeError("the runner has no agent to execute rollouts with: pass agent=…")
        return self._agent

    # --- Life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Announce the worker, and begin to heartbeat and to listen for commands.

        Returns once the first heartbeat arrived, or after 2 s if the store is out of reach.

        Raises:
            RuntimeError: The runner is started already.
        """
        if self._loop is not None:
            raise RuntimeError(f"the runner {self.worker_id} is started already")
        self._loop = asyncio.get_running_loop()
        self._resume()
        if self._launch_mode == "thread":
            self._upkeep = LoopThread(f"lightning-upkeep-{self.worker_id}")
        self._heartbeat = Heartbeat(
            self.store,
            worker_id=self.worker_id,
            instance_id=self.instance_id,
            attempts=self._attempts_in_hand,
            shortest_lease=self._shortest_lease,
            obey=self._obey_from_anywhere,
            interval=self._heartbeat_interval,
            jitter=self._interval_jitter,
            include_gpu=self._include_gpu,
        )
        self._background = [
            asyncio.create_task(self.run_upkeep(self._heartbeat.run())),
            asyncio.create_task(self.run_upkeep(self._listen())),
        ]
        try:
            await asyncio.wait_for(self.run_upkeep(self._heartbeat.wait_first()), _START_WAIT_SECONDS)
        except asyncio.TimeoutError:
            logger.warning("worker %s starts though the store is out of reach", self.worker_id)
        except asyncio.CancelledError:
            await self.stop()
            raise

    async def run(self, event: StopEvent | None = None) -> None:
        """Claim and execute rollouts, until `event` is set, a `Drain` or `Stop` command comes, or `max_rollouts` are
        done. Starts the runner, and stops it in the end, unless it is started already.

        When `event` is set, rollouts in hand get `stop_grace` seconds to end; then, or on a `Stop`, they are
        interrupted and their attempts closed as `unresponsive`, as if this process had died. A drain lets them end.

        Raises:
            RuntimeError: The runner has no agent, or the store was closed.
        """
        self._require_agent()
        if event is not None and event.is_set():
            return
        async with self._started():
            try:
                async with watching(event, lambda: self._end("event")):
                    await self._claim_and_execute()
                    await self._finish_tasks()
            finally:
                self._end("stop")
                await self._finish_tasks()
                self._resume()

    async def step(
        self,
        input: Any,
        *,
        resources: NamedResources | None = None,
        mode: RolloutMode | None = None,
    ) -> Rollout:
        """Execute one task at once, outside the queue. Starts and stops the runner unless it is started already.

        Args:
            input: The task.
            resources: Published and used for it; None: the latest there are.
            mode: What it is for.

        Returns:
            The rollout when it is over.

        Raises:
            Exception: What the agent raised, after the attempt was reported as failed.
        """
        self._require_agent()
        async with self._started():
            resources_id = None
            if resources is not None:
                resources_id = (await self.store.add_resources(resources)).resources_id
            rollout = await self.store.start_rollout(
                input, mode=mode, resources_id=resources_id, worker_id=self.worker_id
            )
            outcome = await self._begin(rollout)
            if outcome.error is not None:
                raise outcome.error
            return await self.store.get_rollout_by_id(rollout.rollout_id) or rollout

    def drain(self) -> None:
        """Let `run` return when the rollouts in hand have ended. May be called from any thread, or a signal handler."""
        self._obey_from_anywhere(Drain(reason="the runner was told to drain"))

    async def heartbeat(self) -> None:
        """Send a heartbeat now, beside the regular ones.

        Raises:
            ConnectionError: The store is out of reach.
            RuntimeError: The runner is not started.
        """
        if self._heartbeat is None:
            raise RuntimeError(f"the runner {self.worker_id} is not started")
        await self.run_upkeep(self._heartbeat.beat())

    async def stop(self) -> None:
        """Interrupt what runs, send the last heartbeat, and end every task and thread. Harmless when called twice."""
        async with self._stopping:
            if self._heartbeat is None:
                return
            self._end("stop")
            await self._finish_tasks()
            for task in self._background:
                task.cancel()
            await asyncio.wait(self._background)
            try:
                await asyncio.wait_for(self.heartbeat(), _LAST_HEARTBEAT_SECONDS)
            except Exception as error:  # noqa: BLE001  # the store may be gone before its runners; that must not keep them
                logger.warning("worker %s: the last heartbeat failed: %r", self.worker_id, error)
            self._release()

    def _release(self) -> None:
        assert self._heartbeat is not None
        self._heartbeat.close()
        self._heartbeat = None
        if self._upkeep is not None:
            self._upkeep.stop()
            self._upkeep = None
        self.threads.close()
        for code in list(self._left_behind):
            code.cancel()
        self._resume()
        self._loop = None

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[None]:
        if self._loop is not None:
            yield
            return
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    # --- Work --------------------------------------------------------------------------------------------------

    async def _claim_and_execute(self) -> None:
        begun = 0
        while not self._wind_down.is_set() and (self._max_rollouts is None or begun < self._max_rollouts):
            free = self._concurrency - len(self._tasks)
            if free < 1:
                await unless(self._wind_down, _first_done(self._tasks))
            else:
                left = free if self._max_rollouts is None else min(free, self._max_rollouts - begun)
                claimed = await unless(self._wind_down, self._claims.take(left))
                if claimed is None:
                    claimed = await self._claims.unanswered()
                for rollout in claimed:
                    self._begin(rollout)
                    begun += 1

    def _begin(self, rollout: AttemptedRollout) -> asyncio.Task[Outcome]:
        execution = AttemptExecution(self, rollout)
        task = asyncio.create_task(execution.run())
        self._executions[execution.attempt_id] = execution
        self._tasks.add(task)
        if self._heartbeat is not None:
            self._heartbeat.lease_begins()

        def ended(task: asyncio.Task[Outcome]) -> None:
            self._executions.pop(execution.attempt_id, None)
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                logger.error("attempt %s broke off", execution.attempt_id, exc_info=task.exception())

        task.add_done_callback(ended)
        if self._ending == "stop":
            self._interrupt(execution)
        return task

    async def _finish_tasks(self) -> None:
        """Wait for the rollouts in hand; whoever is cancelled while waiting cancels them."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            raise

    async def _still_held(self, attempts: list[AttemptRef]) -> list[AttemptRef]:
        assert self._heartbeat is not None
        return await self.run_upkeep(self._heartbeat.still_held(attempts))

    def _attempts_in_hand(self) -> list[AttemptRef]:
        return [attempt_ref(execution.rollout) for execution in list(self._executions.values())]

    def _shortest_lease(self) -> float | None:
        leases = [
            execution.rollout.config.unresponsive_seconds for execution in list(self._executions.values())
        ]
        return min((lease for lease in leases if lease is not None), default=None)

    # --- Being told --------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """No error ends it: another stream of this process's, such as one that a proxy doubled, may come and go."""
        backoff = Backoff()
        while True:
            try:
                commands = await self.store.receive_commands(
                    self.worker_id, instance_id=self.instance_id, timeout=COMMAND_WAIT_SECONDS
                )
            except STORE_AWAY:  # the loop that claims says so
                await backoff.sleep()
            except Exception as error:  # noqa: BLE001  # said once, or it would be said at every heartbeat
                backoff.log_first(
                    logger,
                    "worker %s cannot listen, heartbeats still bring cancels: %r",
                    self.worker_id,
                    error,
                )
                await asyncio.sleep(self._heartbeat_interval)
            else:
                backoff.recovered()
                for command in commands:
                    self._obey_from_anywhere(command)

    def _obey_from_anywhere(self, command: WorkerCommand) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._obey, command)

    def _obey(self, command: WorkerCommand) -> None:
        if isinstance(command, CancelAttempt):
            execution = self._executions.get(command.attempt_id)
            if execution is not None:
                execution.interrupt(f"the store closed it as {command.status}")
        elif isinstance(command, Drain):
            logger.info("worker %s drains: %s", self.worker_id, command.reason or "as it was told")
            self._end("drain")
        elif isinstance(command, Stop):
            logger.info("worker %s stops: %s", self.worker_id, command.reason or "as it was told")
            self._end("stop")
        # new resources need no answer: they are asked for with each rollout

    def _end(self, how: _Ending) -> None:
        """Claim nothing more; a later call can only make the end come sooner."""
        if self._loop is None or _ENDINGS.index(how) <= _ENDINGS.index(self._ending):
            return
        self._ending = how
        self._wind_down.set()
        if how == "event":
            self._grace = self._loop.call_later(self._stop_grace, self._end, "stop")
        elif how == "stop":
            for execution in list(self._executions.values()):
                self._interrupt(execution)

    def _resume(self) -> None:
        """Be ready for another `run`."""
        if self._grace is not None:
            self._grace.cancel()
        self._ending = None
        self._wind_down.clear()

    def _interrupt(self, execution: AttemptExecution) -> None:
        execution.interrupt("its runner was stopped", "unresponsive")

    # --- For the executions ------------------------------------------------------------------------------------

    async def run_upkeep(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the runner's own work where the launch mode says."""
        return await (work if self._upkeep is None else self._upkeep.run(work))

    def leave_behind(self, code: asyncio.Future[Any]) -> None:
        """Stop waiting for code that does not end; see to it that how it ends is nobody's surprise."""
        self._left_behind.add(code)

        def ended(code: asyncio.Future[Any]) -> None:
            self._left_behind.discard(code)
            if not code.cancelled():
                logger.debug("code that was left behind ended: %r", code.exception())

        code.add_done_callback(ended)


_ENDINGS: tuple[_Ending | None, ...] = (None, "drain", "event", "stop")
"""How `run` ends, in order of urgency."""


async def _first_done(tasks: Iterable[asyncio.Task[Any]]) -> None:
    await asyncio.wait(set(tasks), return_when=asyncio.FIRST_COMPLETED)


def _launch_mode(mode: HeartbeatLaunchMode | None, store: LightningStore) -> HeartbeatLaunchMode:
    thread_safe = store.capabilities["thread_safe"]
    if mode is None:
        return "thread" if thread_safe else "asyncio"
    if mode not in ("thread", "asyncio"):
        raise ValueError(f"heartbeat_launch_mode must be 'thread' or 'asyncio', not {mode!r}")
    if mode == "thread" and not thread_safe:
        raise ValueError(
            "heartbeat_launch_mode='thread' needs a thread-safe store: wrap it in LightningStoreThreaded, "
            "or use 'asyncio'"
        )
    return mode


def _check_at_least(least: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")
