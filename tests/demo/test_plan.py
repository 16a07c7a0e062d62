from __future__ import annotations

import pytest

from lightning.demo.plan import TrainingPlan, Validations, episode_seeds


def test_the_plan_validates_at_the_start_now_and_then_and_at_the_end() -> None:
    plan = TrainingPlan(max_iterations=7, iterations_per_validation=3)
    assert [iteration for iteration in range(8) if plan.validates(iteration)] == [0, 3, 6, 7]


def test_seeds_are_reproducible_and_unrelated() -> None:
    seeds = episode_seeds(0, 0, 16, "train")
    assert seeds == episode_seeds(0, 0, 16, "train")
    assert {type(seed) for seed in seeds} == {int}
    others = [
        episode_seeds(0, 0, 16, "val"),
        episode_seeds(0, 1, 16, "train"),
        episode_seeds(1, 0, 16, "train"),
    ]
    assert len({*seeds, *(seed for other in others for seed in other)}) == 64


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more, got -1"):
        episode_seeds(-1, 0, 1, "train")


def test_training_is_solved_after_enough_good_validations_in_a_row() -> None:
    validations = Validations(TrainingPlan(solved_return=490, validations_to_stop=2))
    solved = []
    for iteration, result in enumerate([500.0, 489.0, 490.0, 495.0]):
        assert validations.add(iteration, [result - 1, result + 1]) == result
        solved.append(validations.solved)
    assert solved == [False, False, False, True]
    assert validations.best == (0, 500.0)


def test_the_latest_of_equally_good_policies_is_the_best() -> None:
    validations = Validations(TrainingPlan())
    for iteration, result in [(0, 20.0), (3, 500.0), (6, 500.0), (9, 480.0)]:
        validations.add(iteration, [result])
    assert validations.best == (6, 500.0)


def test_a_validation_needs_episodes() -> None:
    with pytest.raises(ValueError, match="after iteration 3 has no episodes"):
        Validations(TrainingPlan()).add(3, [])
