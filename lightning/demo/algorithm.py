"""The training loop of the demo, as any user's algorithm would be written: hand out, wait, read, learn, publish."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning.demo.episodes import RESOURCE_NAME, CartPolePolicy, EpisodeAdapter
from lightning.demo.plan import TrainingPlan, Validations, episode_seeds
from lightning.demo.policy import PolicyGradientLearner, PolicyWeights, StepStats, Trajectory
from lightning.store.contract import LightningStore
from lightning.training.algorithm import Algorithm
from lightning.types import EnqueueRolloutRequest, Rollout, RolloutConfig, RolloutMode

_EPISODE_CONFIG = RolloutConfig(
    # an episode takes a second at most; a runner that dies with one costs that episode a retry, and no more
    timeout_seconds=120.0,
    unresponsive_seconds=30.0,
    max_attempts=5,
    retry_condition=["timeout", "unresponsive"],
)


@dataclass
class TrainingResult:
    """How a training went, kept up to date while it runs."""

    validations: Validations
    training_returns: list[float] = field(default_factory=list)
    """Mean return of each iteration's training episodes."""
    resources_id: str = ""
    """Under which the versions of the policy were published."""
    retried: int = 0
    """Episodes that took more than one attempt."""

    @property
    def first_validation(self) -> float:
        """Mean return of the untrained policy."""
        return self.validations.curve[0][1]

    @property
    def last_validation(self) -> float:
        """Mean return of the policy that the training ended with."""
        return self.validations.curve[-1][1]


class TrainingObserver(Protocol):
    """Somebody who wants to see a training go by. Called on the algorithm's event loop; must not block."""

    def started(self, store: LightningStore, plan: TrainingPlan) -> None:
        """The training begins."""

    def validated(self, iteration: int, mean_return: float) -> None:
        """The policy of this iteration (0: untrained) was validated."""

    def learned(self, iteration: int, stats: StepStats) -> None:
        """A learning step made the policy of this iteration."""


class CartPoleTraining(Algorithm):
    """Trains the demo's policy.

    Args:
        seed: 0 or more; the same seed gives the same training, whatever the number of runners.
        plan: How long to train.
        observer: Told how it goes.
    """

    def __init__(
        self, seed: int = 0, plan: TrainingPlan | None = None, observer: TrainingObserver | None = None
    ) -> None:
        self._seed = seed
        self._plan = plan or TrainingPlan()
        self._observer = observer
        self._adapter = EpisodeAdapter()
        self.result = TrainingResult(Validations(self._plan))

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        """Train until the plan is fulfilled. The tasks are episodes by seed; datasets are not used.

        Raises:
            RuntimeError: An episode failed for good.
        """
        store = self.get_store()
        if self._observer is not None:
            self._observer.started(store, self._plan)
        learner = PolicyGradientLearner()
        weights = PolicyWeights.initial(self._seed)
        published = await store.add_resources({RESOURCE_NAME: _policy(0, weights)})
        self.result.resources_id = published.resources_id
        await self._validate(0)
        for iteration in range(1, self._plan.max_iterations + 1):
            episodes = await self._play(iteration - 1, self._plan.episodes_per_iteration, "train")
            # the learner computes on a thread, so that heartbeats, waiting and the live view go on
            weights, stats = await asyncio.to_thread(learner.step, weights, episodes)
            await store.update_resources(
                self.result.resources_id, {RESOURCE_NAME: _policy(iteration, weights)}
            )
            self.result.training_returns.append(stats.mean_return)
            if self._observer is not None:
                self._observer.learned(iteration, stats)
            if self._plan.validates(iteration):
                await self._validate(iteration)
                if self.result.validations.solved:
                    return

    async def _validate(self, iteration: int) -> None:
        episodes = await self._play(iteration, self._plan.validation_episodes, "val")
        mean = self.result.validations.add(iteration, [episode.episode_return for episode in episodes])
        if self._observer is not None:
            self._observer.validated(iteration, mean)

    async def _play(self, iteration: int, count: int, mode: RolloutMode) -> list[Trajectory]:
        """Have `count` episodes played by the policy of this iteration, and read them back."""
        store = self.get_store()
        purpose: Literal["train", "val"] = "val" if mode == "val" else "train"
        rollouts = await store.enqueue_many_rollouts(
            [
                EnqueueRolloutRequest(
                    input={"seed": seed, "iteration": iteration},
                    mode=mode,
                    resources_id=self.result.resources_id,
                    config=_EPISODE_CONFIG,
                )
                for seed in episode_seeds(self._seed, iteration, count, purpose)
            ]
        )
        finished = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in rollouts])
        await self._check(finished)
        return list(await asyncio.gather(*(self._read(rollout.rollout_id) for rollout in finished)))

    async def _read(self, rollout_id: str) -> Trajectory:
        spans = await self.get_store().query_spans(rollout_id, "latest")
        trajectory: Trajectory = self.get_adapter().adapt(spans)
        return trajectory

    async def _check(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            attempt = await self.get_store().get_latest_attempt(rollout.rollout_id)
            if attempt is not None and attempt.sequence_id > 1:
                self.result.retried += 1
            if rollout.status != "succeeded":
                reason = "none given" if attempt is None else f"{attempt.status}: {attempt.metadata}"
                raise RuntimeError(f"episode {rollout.rollout_id} {rollout.status} ({reason})")


def _policy(iteration: int, weights: PolicyWeights) -> CartPolePolicy:
    return CartPolePolicy(iteration=iteration, weights=weights.to_lists())
