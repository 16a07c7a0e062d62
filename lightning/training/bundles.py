"""What the trainer hands to an execution strategy: the two sides of a job, ready to travel to other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.agents import Agent
from lightning.execution.base import worker_name
from lightning.execution.events import ExecutionEvent
from lightning.runner import AgentRunner, Hook
from lightning.store.contract import LightningStore
from lightning.tracing import OtelTracer
from lightning.training.adapter import Adapter
from lightning.training.algorithm import Algorithm, Dataset
from lightning.types import NamedResources

T = TypeVar("T")


@dataclass(frozen=True)
class AlgorithmSide:
    """An algorithm with what it needs besides the store. See `Trainer` for what the fields mean."""

    algorithm: Algorithm | None
    adapter: Adapter[Any] | None = None
    initial_resources: NamedResources | None = None
    train_dataset: Dataset[Any] | None = None
    val_dataset: Dataset[Any] | None = None

    async def run(self, store: LightningStore, event: ExecutionEvent) -> None:
        """Run the algorithm against `store`. It is stopped by cancelling this."""
        algorithm = _present(self.algorithm, "algorithm")
        if self.initial_resources is not None:
            await store.add_resources(self.initial_resources)
        if self.adapter is not None:
            algorithm.set_adapter(self.adapter)
        algorithm.set_initial_resources(self.initial_resources)
        algorithm.set_store(store)
        try:
            await algorithm.execute(self.train_dataset, self.val_dataset)
        finally:
            algorithm.set_store(None)  # it is of no use after the job, and would not pickle with the next one


@dataclass(frozen=True)
class RunnerSide:
    """An agent with what its runners need besides the store. See `Trainer` for what the fields mean."""

    agent: Agent | None
    make_runner: Callable[..., AgentRunner]
    """Takes the arguments of `AgentRunner`."""
    tracer: OtelTracer | None = None
    hooks: Sequence[Hook] = ()
    max_rollouts: int | None = None

    async def run(self, store: LightningStore, index: int, event: ExecutionEvent) -> None:
        """Be runner number `index` until `event` is set, the store says stop, or `max_rollouts` are done."""
        runner = self.make_runner(
            store=store,
            agent=_present(self.agent, "agent"),
            worker_id=worker_name(index),
            tracer=self.tracer,
            hooks=self.hooks,
            max_rollouts=self.max_rollouts,
        )
        await runner.run(event)


def _present(value: T | None, name: str) -> T:
    if value is None:
        raise RuntimeError(f"this job has no {name}: by its role, the strategy was not to run one")
    return value
