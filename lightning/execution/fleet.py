"""The runner processes of a job: kept running within a budget, their dead ones' work given back."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal

from lightning.execution.base import WORKER_PREFIX_VARIABLE, ExecutionError, RunnerBundle, worker_name
from lightning.execution.entries import run_runner
from lightning.execution.hosting import StoreHost
from lightning.execution.job import Job, first_of
from lightning.execution.processes import ChildProcess, Payload, describe_exit, stop_children
from lightning.execution.restarts import RESTART_WINDOW_SECONDS, RestartBudget
from lightning.store.contract import LightningStore
from lightning.types import AttemptedRollout, Drain, Stop

logger = logging.getLogger(__name__)

_GIVE_BACK_SECONDS = 10.0
"""How long closing the attempts of a dead runner may take."""
_LAST_GIVE_BACK_SECONDS = 2.0
"""The same when the job ends anyway."""


class RunnerFleet:
    """`count` processes, each running the runner bundle.

    Args:
        job: Fails when no runner is left because they crashed.
        host: The store; to be started before `release`.
        runner: The bundle.
        count: How many.
        prefix: First part of the workers' names.
        restart_budget: How often one runner is restarted within `RESTART_WINDOW_SECONDS` before it is given up.
        allowed_exit_codes: How a runner may end, once it was told to, without a warning.
    """

    def __init__(
        self,
        job: Job,
        host: StoreHost,
        runner: RunnerBundle,
        count: int,
        *,
        prefix: str,
        restart_budget: int,
        allowed_exit_codes: frozenset[int],
    ) -> None:
        self._job = job
        self._host = host
        self._payload = Payload(functools.partial(run_runner, runner=runner, event=job.event), "the runner")
        self._count = count
        self.prefix = prefix
        self._restart_budget = restart_budget
        self._allowed_exit_codes = allowed_exit_codes
        self._pickled_store = b""
        self._store_ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._living: dict[str, ChildProcess] = {}
        self._working: set[ChildProcess] = set()
        """Those that have a store, and take commands."""
        self._keepers: list[asyncio.Task[bool]] = []

    def launch(self) -> None:
        """Start the processes, which load what they need meanwhile."""
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(self._count)]
        for keeper in self._keepers:
            keeper.add_done_callback(self._check_keeper)

    def release(self) -> None:
        """Let them work: the store is up. Raises `TypeError` if other processes cannot use it."""
        self._pickled_store = self._host.pickled_store
        self._store_ready.set()

    async def ended(self) -> None:
        """Wait until no runner is left. That is a failure of the job unless one of them came to its own end."""
        results = await asyncio.gather(*map(asyncio.shield, self._keepers), return_exceptions=True)
        if not self._stopping.is_set() and True not in results:
            self._job.fail(
                ExecutionError(
                    f"no runner is left: {'the runner' if self._count == 1 else f'each of the {self._count} runners'} "
                    f"crashed more than {self._restart_budget} times within {RESTART_WINDOW_SECONDS:.0f} s"
                )
            )

    async def stop(self, *, drain: bool = False) -> None:
        """Have the runners end, and return when their processes are gone.

        Args:
            drain: They may finish what they are working on (for as long as the job's `graceful_timeout`).
        """
        self._stopping.set()
        for child in self._living.values():
            if not child.loaded.done():  # it has nothing to bring to an end
                child.signal(signal.SIGTERM)
        if not drain:
            self._job.event.set()
        useful = self._store_ready.is_set() and self._host.alive
        command = Drain(reason="the runners are shut down") if drain else Stop(reason="the job is over")
        for child in self._working:
            child.send(command)
        others = (  # that somebody else has connected to this job's own store
            asyncio.create_task(self._host.tell_runners(command))
            if self._host.exclusive and useful and self._living
            else None
        )
        await stop_children(self._job, list(self._living.values()), wait_first=useful)
        if others is not None:
            others.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)

    def _check_keeper(self, keeper: asyncio.Task[bool]) -> None:
        error = keeper.exception()
        if error is not None:  # no more processes could be started, for example
            self._job.fail(error)

    # --- One runner ----------------------------------------------------------------------------------------------

    async def _keep(self, index: int) -> bool:
        """Keep a runner running; returns whether it came to its own end."""
        name = worker_name(index, self.prefix)
        budget = RestartBudget(self._restart_budget)
        while True:
            child = ChildProcess(name, self._payload, {WORKER_PREFIX_VARIABLE: self.prefix})
            self._living[name] = child
            await self._let_work(child, index, again=budget.used > 0)
            await asyncio.wait({child.exited})
            del self._living[name]
            self._working.discard(child)
            if self._stopping.is_set():
                await self._check_end(child)
                return True
            if child.finished:
                logger.info("%s has come to its end", name)
                return True
            if child.failed is not None and child.failed.loading:
                self._job.fail(child.error())
                return False
            logger.error("%s%s", child.describe_end(), f"\n{child.failed.trace}" if child.failed else "")
            await self._give_back(name, _GIVE_BACK_SECONDS)
            if not await self._may_restart(name, budget):
                return self._stopping.is_set()

    async def _let_work(self, child: ChildProcess, index: int, *, again: bool) -> None:
        """Send the runner to work when it and the store are ready, unless it dies before."""
        ready = asyncio.create_task(self._ready(child))
        await first_of(ready, child.exited)
        if not ready.done():
            ready.cancel()
            await asyncio.wait({ready})
            return
        if again:  # a claim of its predecessor may have been under way still when that died
            await self._give_back(child.name, _GIVE_BACK_SECONDS)
        if self._stopping.is_set():
            child.signal(signal.SIGTERM)
        else:
            child.send((index, self._pickled_store))
            self._working.add(child)

    async def _ready(self, child: ChildProcess) -> None:
        await asyncio.wait({child.loaded})
        await self._store_ready.wait()

    async def _may_restart(self, name: str, budget: RestartBudget) -> bool:
        if self._stopping.is_set():
            return False
        delay = budget.spend()
        if delay is None:
            logger.error(
                "%s is given up after %d crashes within %.0f s; runners left: %d",
                name,
                budget.used,
                RESTART_WINDOW_SECONDS,
                len(self._living),
            )
            return False
        try:
            await asyncio.wait_for(self._stopping.wait(), delay)
        except asyncio.TimeoutError:
            logger.warning("%s is restarted (%d of %d)", name, budget.used, budget.limit)
            return True
        return False

    async def _give_back(self, name: str, timeout: float) -> None:
        """Close what a dead runner held, so that its rollouts are retried now and not when their time is up."""
        if not self._store_ready.is_set() or not self._host.alive:
            return
        try:
            given_up = await asyncio.wait_for(close_attempts(self._host.store, name), timeout)
        except Exception as error:  # noqa: BLE001 - logged; the job goes on
            logger.warning(
                "the attempts of %s could not be closed: %s: %s", name, type(error).__name__, error
            )
        else:
            if given_up:
                logger.warning("%s held %d attempts, now unresponsive", name, given_up)

    async def _check_end(self, child: ChildProcess) -> None:
        code = child.exited.result()
        if child.killed:
            logger.warning("%s did not stop when it was told to, and was killed", child.name)
        elif code not in self._allowed_exit_codes and self._store_ready.is_set() and self._host.alive:
            logger.warning("%s %s after it was told to stop", child.name, describe_exit(code))
        if not child.finished:  # the store may live on, and with it what this one could not bring to an end
            await self._give_back(child.name, _LAST_GIVE_BACK_SECONDS)


async def close_attempts(store: LightningStore, worker_id: str) -> int:
    """Mark every open attempt of a worker that is dead as `unresponsive`; returns how many there were."""
    open_rollouts = await store.query_rollouts(status_in=["preparing", "running"])
    held = [
        rollout.attempt
        for rollout in open_rollouts
        if isinstance(rollout, AttemptedRollout) and rollout.attempt.worker_id == worker_id
    ]
    for attempt in held:
        await store.update_attempt(attempt.rollout_id, attempt.attempt_id, status="unresponsive")
    return len(held)
