"""The trainer: what it refuses, what it hands to its parts, and whole jobs in shared memory."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning import (
    Adapter,
    Agent,
    AgentRunner,
    Algorithm,
    ClientServerExecutionStrategy,
    ExecutionStrategy,
    Hook,
    InMemoryLightningStore,
    LightningStoreThreaded,
    OtelTracer,
    PromptTemplate,
    SharedMemoryExecutionStrategy,
    Span,
    SQLiteLightningStore,
    Trainer,
    emit_reward,
    find_final_reward,
    rollout,
)
from lightning.types import AttemptedRollout, NamedResources


class Rewards(Adapter[float]):
    """The final reward, or -1."""

    def adapt(self, spans: Sequence[Span]) -> float:
        reward = find_final_reward(spans)
        return -1.0 if reward is None else reward


class Collect(Algorithm):
    """Executes its datasets and keeps what came of them."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        self.seen = {"resources": self.get_initial_resources(), "latest": await store.get_latest_resources()}
        for mode, dataset in (("train", train_dataset), ("val", val_dataset)):
            rollouts = [await store.enqueue_rollout(input=item, mode=mode) for item in dataset or []]  # type: ignore[arg-type]
            ended = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in rollouts])
            self.seen[mode] = [
                (item.status, self.get_adapter().adapt(await store.query_spans(item.rollout_id)))
                for item in ended
            ]


class Failing(Algorithm):
    """An algorithm with a fault."""

    def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        raise ZeroDivisionError("the algorithm's own")


@rollout
async def double(task: float) -> float:
    """An agent whose reward is twice its task."""
    return task * 2


class Halve(Agent):
    """An agent as a class, blocking."""

    def rollout(self, task: Any, resources: NamedResources, rollout: AttemptedRollout) -> None:
        if task is None:
            raise ValueError("nothing to halve")
        emit_reward(task / 2)


class Recorder(ExecutionStrategy):
    """Executes nothing; keeps what it was given."""

    alias = "recorder"

    def __init__(self, n_runners: int = 1) -> None:
        self.n_runners = n_runners
        self.given: tuple[Any, ...] = ()

    def execute(self, algorithm: Any, runner: Any, store: Any = None) -> None:
        self.given = (algorithm, runner, store)


# --- whole jobs ----------------------------------------------------------------------------------------------------


def test_fit_runs_a_job_in_shared_memory() -> None:
    algorithm = Collect()
    resources = {"prompt": PromptTemplate(template="{x}")}
    trainer = Trainer(
        algorithm=algorithm, n_runners=2, strategy="shm", adapter=Rewards, initial_resources=dict(resources)
    )
    trainer.fit(double, [1.0, 2.0], val_dataset=[3.0])
    assert algorithm.seen["train"] == [("succeeded", 2.0), ("succeeded", 4.0)]
    assert algorithm.seen["val"] == [("succeeded", 6.0)]
    assert algorithm.seen["resources"] == resources
    assert algorithm.seen["latest"].resources == resources
    with pytest.raises(RuntimeError, match="has no store"):
        algorithm.get_store()


def test_run_uses_what_the_constructor_was_given() -> None:
    algorithm = Collect()
    Trainer(
        algorithm=algorithm,
        agent=Halve,
        strategy="shm",
        adapter=Rewards(),
        train_dataset=[4.0, None],
        val_dataset=[6.0],
    ).run()
    assert algorithm.seen["train"] == [("succeeded", 2.0), ("failed", -1.0)]
    assert algorithm.seen["val"] == [("succeeded", 3.0)]
    assert algorithm.seen["latest"] is None


def test_what_the_algorithm_raises_comes_out_of_fit() -> None:
    with pytest.raises(ZeroDivisionError, match="the algorithm's own"):
        Trainer(algorithm=Failing, strategy="shm").fit(double, [])


def test_the_users_store_is_used_and_left_open() -> None:
    store = LightningStoreThreaded(InMemoryLightningStore())
    Trainer(algorithm=Collect(), strategy="shm", store=store).fit(double, [1.0])

    async def look() -> list[str]:
        statuses = [item.status for item in await store.query_rollouts()]
        await store.close()
        return statuses

    assert asyncio.run(look()) == ["succeeded"]


def test_dev_executes_the_items_once_on_the_main_thread_and_tells(capfd: pytest.CaptureFixture[str]) -> None:
    threads: list[str] = []

    @rollout
    async def watched(task: float) -> float:
        threads.append(threading.current_thread().name)
        return task

    package = logging.getLogger("lightning")
    propagate = package.propagate
    package.propagate = False  # past pytest's handlers, as if the program had set up none
    try:
        Trainer(strategy="cs", n_runners=8).dev(watched, [1.0], val_dataset=[2.0])
    finally:
        package.propagate = propagate
    assert threads == [threading.main_thread().name] * 2
    lines = [line for line in capfd.readouterr().err.splitlines() if " of " in line]
    assert [line.split(":")[0] for line in lines] == ["1 of 2", "2 of 2"]
    assert lines[1].endswith("reward 2.0")
    assert package.handlers == []


def test_hooks_tracer_and_runner_options_reach_the_runner() -> None:
    seen: list[Any] = []

    class Look(Hook):
        async def on_rollout_start(
            self, *, agent: Agent, runner: AgentRunner, rollout: AttemptedRollout
        ) -> None:
            seen.append((agent, runner.tracer, runner.worker_id, runner.interrupt_grace))

    tracer = OtelTracer()
    Trainer(
        algorithm=Collect,
        strategy="shm",
        tracer=tracer,
        hooks=[Look()],
        runner={"interrupt_grace": 1.5, "concurrency": 2},
    ).fit(double, [1.0])
    assert seen == [(double, tracer, "runner-0", 1.5)]


def test_runners_end_after_max_rollouts() -> None:
    class Count(AgentRunner):
        made: list[int | None] = []  # noqa: RUF012

        def __init__(self, *, max_rollouts: int | None = None, **options: Any) -> None:
            super().__init__(max_rollouts=max_rollouts, **options)
            self.made.append(max_rollouts)

    Trainer(algorithm=Collect, strategy="shm", max_rollouts=3, runner=Count).fit(double, [1.0] * 3)
    assert Count.made == [3]


# --- what goes where -----------------------------------------------------------------------------------------------


def test_the_strategy_gets_no_store_unless_one_was_given() -> None:
    strategy = Recorder()
    Trainer(algorithm=Collect, strategy=strategy).fit(double)
    assert strategy.given[2] is None
    store = InMemoryLightningStore()
    Trainer(algorithm=Collect, strategy=strategy, store=store).fit(double)
    assert strategy.given[2] is store
    Trainer(algorithm=Collect, strategy=strategy, store=InMemoryLightningStore).fit(double)
    assert isinstance(strategy.given[2], InMemoryLightningStore)


def test_a_store_of_foreign_make_is_taken() -> None:
    own = InMemoryLightningStore()

    class Foreign:
        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    algorithm = Collect()
    Trainer(algorithm=algorithm, strategy="shm", store=Foreign(), adapter=Rewards).fit(double, [1.0])
    assert algorithm.seen["train"] == [("succeeded", 2.0)]


def test_a_named_backend_is_left_to_a_strategy_that_can_open_it() -> None:
    in_threads = Recorder()
    Trainer(algorithm=Collect, strategy=in_threads, store="memory").fit(double)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(in_threads.given[2].statistics())
    trainer = Trainer(algorithm=Collect, strategy="cs", store="memory")
    assert trainer.store is None
    assert isinstance(trainer.strategy, ClientServerExecutionStrategy)
    assert trainer.strategy.store_url == "memory"


def test_a_backend_that_is_named_by_its_url_is_opened_for_the_job_and_closed_after_it(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=Collect(), strategy="shm", store=f"sqlite:{tmp_path / 'runs.db'}")
    trainer.fit(double, [1.0])
    trainer.fit(double, [2.0, 3.0])
    store = SQLiteLightningStore(tmp_path / "runs.db")

    async def look() -> list[Any]:
        inputs = [item.input for item in await store.query_rollouts(status_in=["succeeded"])]
        await store.close()
        return inputs

    assert asyncio.run(look()) == [1.0, 2.0, 3.0]


def test_the_sides_of_a_job_travel() -> None:
    strategy = Recorder()
    Trainer(
        algorithm=Collect, strategy=strategy, tracer=OtelTracer, hooks=Hook, runner={"concurrency": 2}
    ).fit(double, [1.0])
    algorithm, runner, _ = pickle.loads(pickle.dumps(strategy.given))
    assert algorithm.__self__.train_dataset == [1.0]
    assert runner.__self__.agent is double


@pytest.mark.parametrize(
    ("n_runners", "strategy", "expected"),
    [
        (None, "shm", 1),
        (3, "shm", 3),
        (3, {"type": "shm"}, 3),
        (3, {"type": "shm", "n_runners": 5}, 3),
        (None, {"type": "shm", "n_runners": 5}, 5),
        (3, SharedMemoryExecutionStrategy, 3),
        (None, SharedMemoryExecutionStrategy(n_runners=5), 5),
        (3, lambda: SharedMemoryExecutionStrategy(n_runners=5), 5),
    ],
)
def test_the_number_of_runners(n_runners: int | None, strategy: Any, expected: int) -> None:
    built = Trainer(n_runners=n_runners, strategy=strategy).strategy
    assert isinstance(built, SharedMemoryExecutionStrategy)
    assert built.n_runners == expected


def test_a_number_of_runners_that_is_not_used_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Trainer(n_runners=3, strategy=SharedMemoryExecutionStrategy(n_runners=3))
    assert not caplog.records
    Trainer(n_runners=3, strategy=SharedMemoryExecutionStrategy(n_runners=5))
    assert "n_runners=3 is not used" in caplog.text


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "http"}, ValueError, r"^strategy='http' is not known: give one of 'shm', 'cs', "),
        ({"strategy": {"type": "shm", "ports": 1}}, TypeError, r"^strategy=.*SharedMemory.*'ports'"),
        ({"algorithm": double}, TypeError, r"^algorithm=.* is not accepted|does not take"),
        ({"algorithm": Algorithm}, TypeError, r"^algorithm=.*: Algorithm is abstract, it lacks run$"),
        ({"agent": "nowhere.at.all:agent"}, ValueError, r"^agent: there is no module 'nowhere'"),
        ({"agent": 3}, TypeError, r"^agent=3 is not accepted: an agent is an Agent or a function"),
        ({"agent": Collect}, TypeError, r"^agent=.* makes a Collect, which is no Agent"),
        ({"tracer": "zipkin"}, ValueError, r"^tracer='zipkin' is not known"),
        ({"adapter": 1}, TypeError, r"^adapter=1 is not accepted"),
        ({"hooks": [Hook, 1]}, TypeError, r"^hooks\[1\]=1 is not accepted"),
        ({"store": "nonsense"}, ValueError, r"^store='nonsense' is not known: give the address"),
        ({"store": "localhost:99999"}, ValueError, r"^'localhost:99999' is not the address of a store"),
        ({"store": 5}, TypeError, r"^store=5 is not accepted"),
        ({"n_runners": 0}, ValueError, r"^n_runners must be a whole number of at least 1, not 0"),
        ({"max_rollouts": True}, ValueError, r"^max_rollouts must be"),
        ({"runner": 4}, TypeError, r"^runner=4 is not accepted: .*give its options as a dict"),
        ({"runner": {"concurency": 4}}, TypeError, r"^runner=\{'concurency': 4\}: .*'concurency'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Trainer(**arguments)


def test_a_job_needs_an_agent_and_an_algorithm() -> None:
    with pytest.raises(ValueError, match=r"^there is no agent: fit\(agent\) or"):
        Trainer(algorithm=Collect).fit()
    with pytest.raises(ValueError, match=r"^there is no algorithm: .*dev\(\)"):
        Trainer().fit(double)


class OneSided(Recorder):
    """A strategy that has a role."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role


def test_a_side_that_the_role_leaves_out_is_not_needed() -> None:
    Trainer(algorithm=Collect, strategy=OneSided("algorithm")).run()
    strategy = OneSided("runner")
    Trainer(agent=double, strategy=strategy).run()
    with pytest.raises(RuntimeError, match="this job has no algorithm"):
        asyncio.run(strategy.given[0](InMemoryLightningStore(), None))
