from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lightning.demo.plan import TrainingPlan, Validations, episode_seeds
from lightning.demo.policy import (
    Batch,
    PolicyGradientLearner,
    PolicyWeights,
    Segment,
    Trajectory,
    act,
    act_greedily,
    discounted_returns,
    fit_baseline,
    log_probabilities,
    play_episode,
    surrogate_objective,
)


def random_weights(seed: int) -> PolicyWeights:
    """Weights with no zeros: those of a trained policy, so to say."""
    rng = np.random.default_rng(seed)
    shapes = [array.shape for array in PolicyWeights.initial(0).arrays()]
    return PolicyWeights(*(rng.normal(scale=0.5, size=shape) for shape in shapes))


def play(weights: PolicyWeights, seed: int, *, greedy: bool = False) -> Trajectory:
    return Trajectory.from_segments(list(play_episode(weights, seed, greedy=greedy)))


def validate(weights: PolicyWeights, seed: int, iteration: int, episodes: int) -> list[float]:
    seeds = episode_seeds(seed, iteration, episodes, "val")
    return [play(weights, episode_seed, greedy=True).episode_return for episode_seed in seeds]


def train(seed: int, plan: TrainingPlan) -> tuple[PolicyWeights, Validations]:
    """The demo's training without a control plane: gives the best policy by validation."""
    weights, learner, validations = PolicyWeights.initial(seed), PolicyGradientLearner(), Validations(plan)
    validated = {0: weights}
    validations.add(0, validate(weights, seed, 0, plan.validation_episodes))
    for iteration in range(1, plan.max_iterations + 1):
        seeds = episode_seeds(seed, iteration, plan.episodes_per_iteration, "train")
        weights, _ = learner.step(weights, [play(weights, episode_seed) for episode_seed in seeds])
        if plan.validates(iteration):
            validated[iteration] = weights
            validations.add(iteration, validate(weights, seed, iteration, plan.validation_episodes))
        if validations.solved:
            break
    return validated[validations.best[0]], validations


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_survive_json_exactly() -> None:
    weights = random_weights(3)
    weights.hidden_bias[:4] = [5e-324, -0.0, 0.1, 1.7976931348623157e308]

    restored = PolicyWeights.from_lists(json.loads(json.dumps(weights.to_lists())))

    for before, after in zip(weights.arrays(), restored.arrays(), strict=True):
        assert after.dtype == np.float64
        assert before.tobytes() == after.tobytes()


def test_lists_hold_plain_floats() -> None:
    lists = random_weights(0).to_lists()
    assert type(lists["hidden_weight"][0][0]) is float
    assert type(lists["output_bias"][0]) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_bias", [0.0, 0.0, 0.0], r"'output_bias' has the shape \(3,\), expected \(2,\)"),
        ("output_bias", [0.0, math.nan], "'output_bias' holds a value that is not finite"),
        ("output_bias", ["a", 0.0], "'output_bias' is not an array of numbers"),
        ("output_bias", [[0.0], 0.0], "'output_bias' is not an array of numbers"),
        ("surplus", [], r"missing or unknown: \['surplus'\]"),
    ],
)
def test_weights_refuse_lists_that_are_none(name: str, value: Any, message: str) -> None:
    lists = PolicyWeights.initial(0).to_lists() | {name: value}
    with pytest.raises(ValueError, match=message):
        PolicyWeights.from_lists(lists)


def test_weights_name_a_missing_entry() -> None:
    lists = PolicyWeights.initial(0).to_lists()
    del lists["hidden_bias"]
    with pytest.raises(ValueError, match=r"missing or unknown: \['hidden_bias'\]"):
        PolicyWeights.from_lists(lists)


# --- acting -------------------------------------------------------------------------------------------------


def test_actions_are_drawn_as_often_as_the_policy_says() -> None:
    weights, observation = random_weights(1), np.array([0.3, -0.5, 0.05, 0.8])
    rng = np.random.default_rng(0)
    draws = [act(weights, observation, rng) for _ in range(4000)]

    logs = log_probabilities(weights, observation)
    assert np.exp(logs).sum() == pytest.approx(1)
    assert 0.05 < math.exp(logs[1]) < 0.95, "the check needs a policy in doubt"
    assert sum(action for action, _ in draws) / len(draws) == pytest.approx(math.exp(logs[1]), abs=0.03)
    assert {log for action, log in draws if action == 1} == {float(logs[1])}
    assert {log for action, log in draws if action == 0} == {float(logs[0])}


def test_greedy_takes_the_likeliest_action() -> None:
    weights, rng = random_weights(2), np.random.default_rng(0)
    for observation in np.random.default_rng(5).normal(size=(50, 4)):
        action, log_probability = act_greedily(weights, observation, rng)
        logs = log_probabilities(weights, observation)
        assert log_probability == logs.max()
        assert logs[action] == logs.max()


def test_greedy_draws_where_the_policy_has_no_preference() -> None:
    weights, rng = PolicyWeights.initial(0), np.random.default_rng(0)
    assert {act_greedily(weights, np.ones(4), rng)[0] for _ in range(50)} == {0, 1}


def test_log_probabilities_stay_finite_for_a_sure_policy() -> None:
    sure = dataclasses.replace(PolicyWeights.initial(0), output_bias=np.array([2000.0, 0.0]))
    assert log_probabilities(sure, np.zeros(4)).tolist() == [0.0, -2000.0]


# --- playing ------------------------------------------------------------------------------------------------


def test_an_episode_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    weights = random_weights(0)
    assert list(play_episode(weights, 7)) == list(play_episode(weights, 7))
    assert list(play_episode(weights, 7)) != list(play_episode(weights, 8))


def test_segments_are_flat_lists_of_floats_and_ints() -> None:
    segments = list(play_episode(PolicyWeights.initial(0), 1, steps_per_segment=5))

    assert len(segments) > 1
    assert [segment.final for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert all(len(segment.actions) == 5 for segment in segments[:-1])
    assert len(segments[0].observations) == 20
    for segment in segments:
        assert {type(value) for value in [*segment.observations, *segment.rewards]} == {float}
        assert {type(value) for value in segment.log_probabilities} == {float}
        assert {type(action) for action in segment.actions} == {int}


def test_the_length_of_segments_does_not_change_the_episode() -> None:
    weights = PolicyWeights.initial(0)
    whole = Trajectory.from_segments(list(play_episode(weights, 4, steps_per_segment=1000)))
    joined = Trajectory.from_segments(list(play_episode(weights, 4, steps_per_segment=3))[::-1])

    assert np.array_equal(whole.observations, joined.observations)
    assert whole.actions.tolist() == joined.actions.tolist()
    assert whole.log_probabilities.tolist() == joined.log_probabilities.tolist()
    assert whole.episode_return == joined.episode_return == len(whole.actions)


def test_recorded_log_probabilities_are_those_of_the_policy() -> None:
    weights = random_weights(0)
    episode = play(weights, 3)
    logs = log_probabilities(weights, episode.observations)
    assert logs[np.arange(len(episode.actions)), episode.actions] == pytest.approx(episode.log_probabilities)


def test_an_episode_closes_its_environment_when_it_is_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium

    closed: list[bool] = []
    make = gymnasium.make

    def make_watched(*args: Any, **options: Any) -> Any:
        environment = make(*args, **options)
        monkeypatch.setattr(environment, "close", lambda: closed.append(True))
        return environment

    monkeypatch.setattr(gymnasium, "make", make_watched)
    segments = play_episode(PolicyWeights.initial(0), 1, steps_per_segment=1)
    next(segments)
    assert not closed
    segments.close()
    assert closed == [True]


def test_segments_have_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="steps_per_segment must be at least 1, got 0"):
        play_episode(PolicyWeights.initial(0), 1, steps_per_segment=0)


def test_importing_the_policy_does_not_import_gymnasium() -> None:
    program = "import sys, lightning.demo.policy; sys.exit('gymnasium' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


# --- trajectories -------------------------------------------------------------------------------------------


def segment(first_step: int, steps: int, *, final: bool = False) -> Segment:
    return Segment(first_step, [0.0] * 4 * steps, [0] * steps, [-0.5] * steps, [1.0] * steps, final)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "0 segments must have one final"),
        ([segment(0, 2)], "1 segments must have one final"),
        ([segment(0, 2, final=True), segment(2, 2)], "must have one final segment, the last"),
        ([segment(0, 2), segment(3, 2, final=True)], "continues at step 3 after 2 steps"),
        ([segment(0, 2), segment(0, 2), segment(2, 1, final=True)], "continues at step 0 after 2 steps"),
        ([segment(2, 2, final=True)], "continues at step 2 after 0 steps"),
        (
            [Segment(0, [0.0] * 4, [0], [], [1.0], True)],
            "1 actions, 0 log-probabilities, 1 rewards and 4 obs",
        ),
        ([Segment(0, [0.0] * 3, [0], [-0.5], [1.0], True)], "segment at step 0 has .* 3 observation values"),
    ],
)
def test_segments_that_are_not_one_whole_episode_are_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory.from_segments(segments)


# --- learning -----------------------------------------------------------------------------------------------


def test_discounted_returns() -> None:
    assert discounted_returns(np.array([1.0, 0.0, 4.0]), 0.5).tolist() == [2.0, 2.0, 4.0]


def test_the_baseline_predicts_what_depends_on_the_observation() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(200, 4))
    trajectory = Trajectory(observations, np.zeros(200, np.int64), np.zeros(200), np.ones(200))
    returns = 3 + observations[:, 0] - 2 * observations[:, 1] * observations[:, 3]
    assert fit_baseline([trajectory], returns, ridge=1e-9) == pytest.approx(returns, abs=1e-4)


def batch_of(weights: PolicyWeights, *, shift: float) -> Batch:
    """Steps that were played by a policy whose log-probabilities differ from that of `weights` by up to `shift`."""
    rng = np.random.default_rng(11)
    observations = rng.normal(size=(60, 4)) * [1.0, 1.0, 0.1, 1.0]
    actions = rng.integers(0, 2, size=60)
    logs = log_probabilities(weights, observations)[np.arange(60), actions]
    return Batch(observations, actions, logs + rng.uniform(-shift, shift, size=60), rng.normal(size=60))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_gradient_agrees_with_finite_differences(shift: float) -> None:
    weights = random_weights(4)
    batch = batch_of(weights, shift=shift)
    _, gradient = surrogate_objective(weights, batch, clip=0.2)

    half_width = 1e-6
    for array, slope in zip(weights.arrays(), gradient.arrays(), strict=True):
        measured = np.empty_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + half_width
            above, _ = surrogate_objective(weights, batch, clip=0.2)
            array[index] = kept - half_width
            below, _ = surrogate_objective(weights, batch, clip=0.2)
            array[index] = kept
            measured[index] = (above - below) / (2 * half_width)
        assert np.abs(slope).max() > 1e-4
        assert slope == pytest.approx(measured, abs=1e-8)


def test_steps_beyond_the_clip_pull_no_further() -> None:
    weights = random_weights(4)
    batch = batch_of(weights, shift=0.0)
    beyond = dataclasses.replace(batch, log_probabilities=batch.log_probabilities - np.sign(batch.advantages))
    _, gradient = surrogate_objective(weights, beyond, clip=0.2)
    assert all(not array.any() for array in gradient.arrays())


def test_a_step_is_the_same_whatever_the_order_of_the_episodes_and_leaves_the_old_weights() -> None:
    weights = random_weights(0)
    before = weights.to_lists()
    episodes = [play(weights, seed) for seed in range(6)]

    forward, forward_stats = PolicyGradientLearner().step(weights, episodes)
    backward, backward_stats = PolicyGradientLearner().step(weights, episodes[::-1])

    assert forward.to_lists() == backward.to_lists()
    assert forward_stats == backward_stats
    assert weights.to_lists() == before
    assert forward.to_lists() != before


def test_stats_describe_the_step() -> None:
    weights = PolicyWeights.initial(0)
    episodes = [play(weights, seed) for seed in range(4)]
    _, stats = PolicyGradientLearner().step(weights, episodes)

    lengths = [len(episode.actions) for episode in episodes]
    assert (stats.episodes, stats.steps) == (4, sum(lengths))
    assert stats.mean_return == sum(lengths) / 4
    assert stats.entropy == pytest.approx(math.log(2))
    assert 0 < stats.explained_variance < 1
    assert stats.gradient_norm > 0


def test_a_step_needs_episodes() -> None:
    with pytest.raises(ValueError, match="at least one trajectory"):
        PolicyGradientLearner().step(PolicyWeights.initial(0), [])


def test_few_episodes_improve_the_policy() -> None:
    plan = TrainingPlan(
        max_iterations=3, iterations_per_validation=3, episodes_per_iteration=8, validation_episodes=10
    )
    _, validations = train(1, plan)
    (_, start), (iteration, end) = validations.curve
    assert iteration == 3
    assert start < 40
    assert end > 2 * start


@pytest.mark.parametrize("seed", [0, 16])
def test_training_solves_cartpole(seed: int) -> None:
    policy, validations = train(seed, TrainingPlan())
    assert validations.curve[0][1] < 40
    # Episodes that had no part in choosing the policy.
    unseen = validate(policy, seed, 10**6, 20)
    assert sum(unseen) / len(unseen) >= 475
