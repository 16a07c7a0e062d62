"""The trainer: puts an algorithm, an agent and a store together and runs them until the algorithm is done."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from typing import Any

from lightning.agents import Agent
from lightning.execution import ExecutionStrategy, SharedMemoryExecutionStrategy
from lightning.runner import AgentRunner, Hook
from lightning.store.contract import LightningStore
from lightning.store.open import is_store_url
from lightning.store.threaded import LoopThread
from lightning.tracing import OtelTracer
from lightning.training.adapter import Adapter
from lightning.training.algorithm import Algorithm, Dataset, SinglePass
from lightning.training.bundles import AlgorithmSide, RunnerSide
from lightning.training.components import (
    build_agent,
    build_component,
    build_store,
    load_object,
    names_store,
    open_named_store,
)
from lightning.types import NamedResources

logger = logging.getLogger(__name__)

Component = Any
"""An instance, a class, a callable, an alias, a dotted path or a dict: see `lightning.training.components`."""
Hooks = Any

STRATEGIES: Mapping[str, str] = {
    "shm": "lightning.execution:SharedMemoryExecutionStrategy",
    "cs": "lightning.execution:ClientServerExecutionStrategy",
}
"""Aliases of execution strategies."""


class Trainer:
    """Runs a training job.

    ```python
    trainer = Trainer(algorithm=MyAlgorithm(), n_runners=4)
    trainer.fit(my_agent, train_dataset=tasks)
    ```

    Every component can be given as an instance, a class, a callable without arguments, an alias, a dotted path or a
    dict, see `lightning.training.components`.

    Args:
        algorithm: An `Algorithm`. Not needed where the strategy only runs runners.
        agent: An `Agent`, usually a function decorated with `rollout`; `fit` can give it as well.
        n_runners: How many runners; None: what the strategy says, which is 1 if it says nothing. A strategy that is
            an instance already keeps its own number.
        strategy: An `ExecutionStrategy`, or `"cs"` (a server, and runners in processes of their own, over gRPC) or
            `"shm"` (threads of one process).
        store: A `LightningStore`, which stays yours to close; or the address `"host:port"` of a store server, or the
            URL of a backend such as `"memory"` or `"sqlite:runs.db"`, which each job opens and closes. None: the
            strategy makes a store for each job.
        tracer: An `OtelTracer`; None: one with the default settings.
        adapter: An `Adapter` for the algorithm; None: the algorithm's own.
        hooks: One `Hook`, or several, called around each rollout in the order given.
        initial_resources: Published before the algorithm runs.
        max_rollouts: Each runner ends after so many rollouts; None: when it is told to stop.
        runner: Options of the `AgentRunner` as a dict, such as `{"concurrency": 4}`; with a `type`, or given as a
            class or a path, another class of runner that takes the same arguments.
        train_dataset, val_dataset: For `run`, and for `fit` where it is given none.

    Raises:
        TypeError, ValueError: A component is none of the accepted forms, or makes something else.
    """

    def __init__(
        self,
        algorithm: Component | None = None,
        agent: Component | None = None,
        n_runners: int | None = None,
        strategy: Component = "cs",
        store: Component | None = None,
        tracer: Component | None = None,
        adapter: Component | None = None,
        hooks: Hooks | None = None,
        initial_resources: NamedResources | None = None,
        max_rollouts: int | None = None,
        runner: Component | None = None,
        train_dataset: Dataset[Any] | None = None,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        _check_positive("n_runners", n_runners)
        _check_positive("max_rollouts", max_rollouts)
        self.algorithm: Algorithm | None = (
            None if algorithm is None else build_component("algorithm", algorithm, Algorithm)
        )
        self.agent: Agent | None = None if agent is None else build_agent("agent", agent)
        self._store_name: str | None = store if names_store(store) else None
        self.strategy = _build_strategy(strategy, n_runners, self._store_name)
        self.store: LightningStore | None = (
            None if store is None or self._store_name is not None else build_store("store", store)
        )
        self.tracer: OtelTracer | None = (
            None if tracer is None else build_component("tracer", tracer, OtelTracer)
        )
        self.adapter: Adapter[Any] | None = (
            None if adapter is None else build_component("adapter", adapter, Adapter)
        )
        self.hooks = _build_hooks(hooks)
        self.initial_resources = initial_resources
        self.max_rollouts = max_rollouts
        self.make_runner = _runner_maker(runner)
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset

    def fit(
        self,
        agent: Component | None = None,
        train_dataset: Dataset[Any] | None = None,
        *,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """Train `agent`; returns when the algorithm is done and everything that was started for it has ended.

        What is not given here is taken from the constructor.

        Raises:
            ValueError: There is no agent or no algorithm, and the strategy's role needs it.
            Exception: Whatever the algorithm raised.
        """
        self._execute(self.strategy, self.algorithm, agent, train_dataset, val_dataset)

    def run(self) -> None:
        """`fit` with what the constructor was given: blocks until done."""
        self.fit()

    def dev(
        self,
        agent: Component | None = None,
        train_dataset: Dataset[Any] | None = None,
        *,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """`fit` for debugging: everything in this process, one runner, on the main thread, so that breakpoints work.

        The strategy of the constructor is not used. Without an algorithm, each item of the datasets is executed once
        (`SinglePass`), and how it went is logged, to the terminal if logging is not set up.
        """
        strategy = SharedMemoryExecutionStrategy(n_runners=1, main_thread="runner")
        with _visible_log():
            self._execute(strategy, self.algorithm or SinglePass(), agent, train_dataset, val_dataset)

    def _execute(
        self,
        strategy: ExecutionStrategy,
        algorithm: Algorithm | None,
        agent: Component | None,
        train_dataset: Dataset[Any] | None,
        val_dataset: Dataset[Any] | None,
    ) -> None:
        built = self.agent if agent is None else build_agent("agent", agent)
        role = getattr(strategy, "role", "both")
        if built is None and role != "algorithm":
            raise ValueError(
                "there is no agent: fit(agent) or Trainer(agent=...) takes a function decorated with @rollout"
            )
        if algorithm is None and role != "runner":
            raise ValueError(
                "there is no algorithm: give Trainer(algorithm=...), or call dev(), which executes each item of the "
                "datasets once"
            )
        algorithm_side = AlgorithmSide(
            algorithm,
            adapter=self.adapter,
            initial_resources=self.initial_resources,
            train_dataset=self.train_dataset if train_dataset is None else train_dataset,
            val_dataset=self.val_dataset if val_dataset is None else val_dataset,
        )
        runner_side = RunnerSide(
            built,
            self.make_runner,
            tracer=self.tracer,
            hooks=self.hooks,
            max_rollouts=self.max_rollouts,
        )
        with self._store_for(strategy) as store:
            strategy.execute(algorithm_side.run, runner_side.run, store)

    @contextlib.contextmanager
    def _store_for(self, strategy: ExecutionStrategy) -> Generator[LightningStore | None, None, None]:
        """The user's store; or one opened for this job; or None where the strategy opens it, in a better place."""
        if self._store_name is None or getattr(strategy, "store_url", None) == self._store_name:
            yield self.store
            return
        store = open_named_store(self._store_name)
        try:
            yield store
        finally:
            thread = LoopThread(
                "lightning-close"
            )  # this thread may have an event loop that is busy: a notebook's
            try:
                thread.run_blocking(store.close())
            finally:
                thread.stop()


def _build_strategy(given: Component, n_runners: int | None, store_name: str | None) -> ExecutionStrategy:
    store_url = store_name if store_name is not None and is_store_url(store_name) else None
    wanted = {"n_runners": n_runners, "store_url": store_url}
    options = {name: value for name, value in wanted.items() if value is not None}
    strategy: ExecutionStrategy = build_component(
        "strategy", given, ExecutionStrategy, aliases=STRATEGIES, options=options
    )
    own = getattr(strategy, "n_runners", n_runners)
    if n_runners is not None and own != n_runners:
        logger.warning("n_runners=%d is not used: the strategy was built with n_runners=%s", n_runners, own)
    return strategy


def _build_hooks(given: Hooks | None) -> list[Hook]:
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return [build_component(f"hooks[{index}]", item, Hook) for index, item in enumerate(given)]
    return [build_component("hooks", given, Hook)]


def _runner_maker(given: Component | None) -> Callable[..., AgentRunner]:
    """What makes a runner, once the arguments are known that differ from job to job."""
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"type": given}
    maker = options.pop("type", None) or AgentRunner
    if isinstance(maker, str):
        maker = load_object("runner", maker)
    if not callable(maker):
        raise TypeError(
            f"runner={given!r} is not accepted: every runner is made anew, so give its options as a dict, such as "
            f"{{'concurrency': 4}}, or a class or callable that takes the arguments of AgentRunner"
        )
    try:
        inspect.signature(maker).bind_partial(**options)
    except TypeError as error:
        raise TypeError(f"runner={given!r}: {error}") from None
    return functools.partial(maker, **options)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


@contextlib.contextmanager
def _visible_log() -> Generator[None, None, None]:
    """Show this package's log where the program has not said what to do with it."""
    package = logging.getLogger("lightning")
    if package.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
