"""The course of the demo's training: which episodes are played, when the policy is validated, when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class TrainingPlan:
    """How long to train and how often to look. With the defaults about 10 iterations solve CartPole."""

    max_iterations: int = 30
    episodes_per_iteration: int = 16
    iterations_per_validation: int = 2
    validation_episodes: int = 20
    solved_return: float = 490.0
    """A validation with at least this mean return counts as solved; the environment's best is 500."""
    validations_to_stop: int = 3
    """Stop after so many solved validations in a row."""

    def validates(self, iteration: int) -> bool:
        """Whether the policy is validated after this iteration; 0 is before the first."""
        return iteration % self.iterations_per_validation == 0 or iteration == self.max_iterations


def episode_seeds(seed: int, iteration: int, count: int, purpose: Literal["train", "val"]) -> list[int]:
    """Seeds for `count` episodes; those of different iterations, purposes and trainings are unrelated.

    Raises `ValueError` when `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"a seed must be 0 or more, got {seed}")
    sequence = np.random.SeedSequence([seed, iteration, 0 if purpose == "train" else 1])
    return [int(word) for word in sequence.generate_state(count)]


@dataclass
class Validations:
    """The validations of a training so far: which policy is the best, and whether it is good enough to stop."""

    plan: TrainingPlan
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(iteration, mean return) of each validation."""

    def add(self, iteration: int, returns: Sequence[float]) -> float:
        """Note the returns of the episodes that validated an iteration's policy; gives their mean.

        Raises `ValueError` when there are none.
        """
        if not returns:
            raise ValueError(f"the validation after iteration {iteration} has no episodes")
        mean = sum(returns) / len(returns)
        self.curve.append((iteration, mean))
        return mean

    @property
    def best(self) -> tuple[int, float]:
        """(iteration, mean return) of the best validation, the latest among equals.

        Raises `ValueError` before the first.
        """
        return max(self.curve, key=lambda point: (point[1], point[0]))

    @property
    def solved(self) -> bool:
        """Whether the latest validations were all good enough to stop."""
        latest = self.curve[-self.plan.validations_to_stop :]
        return len(latest) == self.plan.validations_to_stop and all(
            mean >= self.plan.solved_return for _, mean in latest
        )
