"""The learning core of the demo: a small policy for CartPole-v1 and the step that makes it better.

Mathematics and data only. Nothing here knows the store or the network: a runner plays an episode with
`play_episode` and sends its `Segment`s while it plays; an algorithm joins them to a `Trajectory` and hands
a batch of those to `PolicyGradientLearner.step`.

The method is REINFORCE with a baseline: raise the log-probability of each action in proportion to how much
better the discounted return after it was than a baseline predicted (R. J. Williams, "Simple statistical
gradient-following algorithms for connectionist reinforcement learning", Machine Learning 8, 1992). The
baseline is a ridge regression of the returns on the observation and the time, fitted anew to each batch.
The gradient is taken of the clipped probability ratio (J. Schulman et al., "Proximal policy optimization
algorithms", arXiv:1707.06347, 2017). On the policy that played, that is Williams' gradient exactly; the
recorded log-probabilities are what allows a second update from the same episodes, and episodes that an
older version of the policy played. The updates are made by Adam (D. P. Kingma and J. Ba, arXiv:1412.6980,
2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

ENVIRONMENT = "CartPole-v1"
OBSERVATION_SIZE = 4
HIDDEN_UNITS = 32
ACTION_COUNT = 2
MAX_EPISODE_STEPS = 500

# The largest ordinary size of: cart position (m), cart speed (m/s), pole angle (rad), pole speed (rad/s).
# The network and the baseline see observations divided by these.
_OBSERVATION_SCALE = np.array([2.4, 3.0, 0.21, 3.0])

_STEPS_PER_SEGMENT = 50


@dataclass(frozen=True, eq=False)
class PolicyWeights:
    """A network of one tanh layer: observation (4) → hidden (32) → one logit for each action (2).

    Immutable by convention: a learner returns new weights and leaves the old ones as they are.
    """

    hidden_weight: FloatArray
    hidden_bias: FloatArray
    output_weight: FloatArray
    output_bias: FloatArray

    @classmethod
    def initial(cls, seed: int) -> PolicyWeights:
        """Weights of an untrained policy, the same for the same seed.

        The output layer starts at zero, so that whatever the seed, the policy begins by pushing left or right
        with equal probability, which keeps the pole up for about 22 steps.
        """
        return cls(
            hidden_weight=np.random.default_rng(seed).normal(size=(OBSERVATION_SIZE, HIDDEN_UNITS)),
            hidden_bias=np.zeros(HIDDEN_UNITS),
            output_weight=np.zeros((HIDDEN_UNITS, ACTION_COUNT)),
            output_bias=np.zeros(ACTION_COUNT),
        )

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> PolicyWeights:
        """The inverse of `to_lists`.

        Raises `ValueError` naming the entry that is missing, unknown, misshapen or not finite.
        """
        if lists.keys() != _WEIGHT_SHAPES.keys():
            wrong = sorted(lists.keys() ^ _WEIGHT_SHAPES.keys())
            raise ValueError(
                f"policy weights have the entries {sorted(_WEIGHT_SHAPES)}; missing or unknown: {wrong}"
            )
        return cls(**{name: _read_array(name, lists[name], shape) for name, shape in _WEIGHT_SHAPES.items()})

    def to_lists(self) -> dict[str, Any]:
        """The weights as nested lists of floats by name, which JSON carries exactly."""
        return {name: getattr(self, name).tolist() for name in _WEIGHT_SHAPES}

    def arrays(self) -> tuple[FloatArray, ...]:
        """The arrays in the order of the fields."""
        return tuple(getattr(self, name) for name in _WEIGHT_SHAPES)


_WEIGHT_SHAPES: dict[str, tuple[int, ...]] = dict(
    zip(
        (entry.name for entry in fields(PolicyWeights)),
        ((OBSERVATION_SIZE, HIDDEN_UNITS), (HIDDEN_UNITS,), (HIDDEN_UNITS, ACTION_COUNT), (ACTION_COUNT,)),
        strict=True,
    )
)


def _read_array(name: str, values: Any, shape: tuple[int, ...]) -> FloatArray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy weights: {name!r} is not an array of numbers: {error}") from error
    if array.shape != shape:
        raise ValueError(f"policy weights: {name!r} has the shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"policy weights: {name!r} holds a value that is not finite")
    return array


# --- acting ------------------------------------------------------------------------------------------------


def _hidden(weights: PolicyWeights, observations: FloatArray) -> FloatArray:
    return np.tanh(observations / _OBSERVATION_SCALE @ weights.hidden_weight + weights.hidden_bias)


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probabilities(weights: PolicyWeights, observations: FloatArray) -> FloatArray:
    """The log-probability of each action, for one observation (→ 2) or for a batch of them (→ N×2)."""
    return _log_softmax(_hidden(weights, observations) @ weights.output_weight + weights.output_bias)


def act(weights: PolicyWeights, observation: FloatArray, rng: np.random.Generator) -> tuple[int, float]:
    """An action drawn from the policy, as training explores, and its log-probability."""
    logs = log_probabilities(weights, observation)
    action = int(rng.random() >= math.exp(logs[0]))
    return action, float(logs[action])


def act_greedily(
    weights: PolicyWeights, observation: FloatArray, rng: np.random.Generator
) -> tuple[int, float]:
    """The policy's likeliest action, as evaluation plays, and its log-probability.

    A tie is drawn by lot: an untrained policy, which has no preference, pushes at random.
    """
    logs = log_probabilities(weights, observation)
    if logs[0] == logs[1]:
        return act(weights, observation, rng)
    action = int(np.argmax(logs))
    return action, float(logs[action])


# --- playing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one episode, in the flat lists that span attributes are made of."""

    first_step: int
    """Number of steps played before this segment."""
    observations: Sequence[float]
    """What the policy saw, `OBSERVATION_SIZE` values for each step, one step after the other."""
    actions: Sequence[int]
    log_probabilities: Sequence[float]
    """Each action's log-probability under the policy that played."""
    rewards: Sequence[float]
    final: bool
    """Whether the episode ended with this segment."""


_Choice: TypeAlias = Callable[[PolicyWeights, FloatArray, np.random.Generator], tuple[int, float]]


def play_episode(
    weights: PolicyWeights, seed: int, *, greedy: bool = False, steps_per_segment: int = _STEPS_PER_SEGMENT
) -> Generator[Segment, None, None]:
    """Play one episode of CartPole and yield it, while it is played, in segments of `steps_per_segment` steps.

    The last segment may be shorter. The same weights and seed give the same episode. Closing the generator
    early closes the environment.

    Raises `ValueError` when `steps_per_segment` is below 1.
    """
    if steps_per_segment < 1:
        raise ValueError(f"steps_per_segment must be at least 1, got {steps_per_segment}")
    return _play(weights, seed, act_greedily if greedy else act, steps_per_segment)


def _play(
    weights: PolicyWeights, seed: int, choose: _Choice, steps_per_segment: int
) -> Generator[Segment, None, None]:
    import gymnasium  # here, because it is slow to import and only a runner that plays needs it

    environment = gymnasium.make(ENVIRONMENT, max_episode_steps=MAX_EPISODE_STEPS, disable_env_checker=True)
    try:
        # The environment draws its start from default_rng(seed); the actions must not come from the same numbers.
        rng = np.random.default_rng([seed, 1])
        observation, _ = environment.reset(seed=seed)
        first_step, ended = 0, False
        while not ended:
            observations: list[float] = []
            actions: list[int] = []
            logs: list[float] = []
            rewards: list[float] = []
            while not ended and len(actions) < steps_per_segment:
                seen = observation.astype(np.float64)
                action, log_probability = choose(weights, seen, rng)
                observation, reward, terminated, truncated, _ = environment.step(action)
                observations.extend(seen.tolist())
                actions.append(action)
                logs.append(log_probability)
                rewards.append(float(reward))
                ended = terminated or truncated
            yield Segment(first_step, observations, actions, logs, rewards, final=ended)
            first_step += len(actions)
    finally:
        environment.close()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One whole episode of T steps."""

    observations: FloatArray
    """T×4."""
    actions: IntArray
    log_probabilities: FloatArray
    rewards: FloatArray

    @property
    def episode_return(self) -> float:
        """The undiscounted sum of the rewards: for CartPole, the number of steps, at most 500."""
        return float(self.rewards.sum())

    @classmethod
    def from_segments(cls, segments: Sequence[Segment]) -> Trajectory:
        """Join the segments of one episode, given in any order.

        Raises `ValueError` saying what is wrong when they are not one complete episode: a gap or an overlap,
        lists of unequal length, no final segment.
        """
        ordered = sorted(segments, key=lambda segment: segment.first_step)
        step = 0
        for segment in ordered:
            if segment.first_step != step:
                raise ValueError(f"episode continues at step {segment.first_step} after {step} steps")
            step += _segment_length(segment)
        if [segment.final for segment in ordered] != [False] * (len(ordered) - 1) + [True]:
            raise ValueError(f"episode of {len(ordered)} segments must have one final segment, the last")
        return cls(
            observations=np.concatenate(
                [np.reshape(np.asarray(s.observations, np.float64), (-1, OBSERVATION_SIZE)) for s in ordered]
            ),
            actions=np.concatenate([np.asarray(s.actions, np.int64) for s in ordered]),
            log_probabilities=np.concatenate([np.asarray(s.log_probabilities, np.float64) for s in ordered]),
            rewards=np.concatenate([np.asarray(s.rewards, np.float64) for s in ordered]),
        )


def _segment_length(segment: Segment) -> int:
    steps = len(segment.actions)
    lengths = (len(segment.log_probabilities), len(segment.rewards), len(segment.observations))
    if steps == 0 or lengths != (steps, steps, steps * OBSERVATION_SIZE):
        raise ValueError(
            f"segment at step {segment.first_step} has {steps} actions, {lengths[0]} log-probabilities, "
            f"{lengths[1]} rewards and {lengths[2]} observation values"
        )
    return steps


# --- learning ----------------------------------------------------------------------------------------------


def discounted_returns(rewards: FloatArray, discount: float) -> FloatArray:
    """For each step, the sum of its reward and of `discount` times the return of the step after it."""
    returns = np.empty(len(rewards))
    following = 0.0
    for step in range(len(rewards) - 1, -1, -1):
        following = rewards[step] + discount * following
        returns[step] = following
    return returns


def _baseline_features(trajectory: Trajectory) -> FloatArray:
    """What the baseline regresses on: the observation, the products of its parts, and powers of the time.

    Time matters because an episode is cut at 500 steps: late in it the same observation is worth less.
    """
    observation = trajectory.observations / _OBSERVATION_SCALE
    rows, columns = np.triu_indices(OBSERVATION_SIZE)
    time = np.arange(len(observation))[:, None] / MAX_EPISODE_STEPS
    return np.hstack([observation, observation[:, rows] * observation[:, columns], time ** np.arange(4)])


def fit_baseline(
    trajectories: Sequence[Trajectory], returns: FloatArray, *, ridge: float = 1e-3
) -> FloatArray:
    """The ridge regression's prediction of `returns`, those of all trajectories one after the other."""
    features = np.vstack([_baseline_features(trajectory) for trajectory in trajectories])
    penalty = ridge * np.eye(features.shape[1])
    return features @ np.linalg.solve(features.T @ features + penalty, features.T @ returns)


@dataclass(frozen=True, eq=False)
class Batch:
    """The steps of several episodes, one after the other, with the advantage of each action over the baseline."""

    observations: FloatArray
    actions: IntArray
    log_probabilities: FloatArray
    advantages: FloatArray


def surrogate_objective(weights: PolicyWeights, batch: Batch, clip: float) -> tuple[float, PolicyWeights]:
    """The clipped surrogate objective, to be maximised, and its gradient by the weights.

    Each step contributes min(r·A, clip(r, 1 - clip, 1 + clip)·A), where A is its advantage and r how much
    likelier its action is now than when it was played: no gain is seen in moving an action's probability
    further than that.
    """
    steps = np.arange(len(batch.actions))
    inputs = batch.observations / _OBSERVATION_SCALE
    hidden = _hidden(weights, batch.observations)
    logs = _log_softmax(hidden @ weights.output_weight + weights.output_bias)
    ratios = np.exp(logs[steps, batch.actions] - batch.log_probabilities)
    gains = ratios * batch.advantages
    clipped_gains = np.clip(ratios, 1 - clip, 1 + clip) * batch.advantages

    # Of a step's gain, only the unclipped branch depends on the weights; d(ratio) is ratio · d(log-probability).
    by_log = np.where(gains <= clipped_gains, gains, 0.0) / len(steps)
    by_logits = -np.exp(logs) * by_log[:, None]
    by_logits[steps, batch.actions] += by_log
    by_hidden = by_logits @ weights.output_weight.T * (1 - hidden**2)
    gradient = PolicyWeights(
        hidden_weight=inputs.T @ by_hidden,
        hidden_bias=by_hidden.sum(axis=0),
        output_weight=hidden.T @ by_logits,
        output_bias=by_logits.sum(axis=0),
    )
    return float(np.minimum(gains, clipped_gains).mean()), gradient


@dataclass(frozen=True)
class StepStats:
    """What one learning step was made from and how it went."""

    episodes: int
    steps: int
    """Environment steps in all episodes together."""
    mean_return: float
    explained_variance: float
    """How much of the returns' variance the baseline predicts: 1 is all of it, 0 none."""
    entropy: float
    """Mean over the steps, in nats, before the update: ln 2 ≈ 0.69 tosses a coin, 0 never explores."""
    gradient_norm: float
    """Euclidean norm of the first update's gradient."""


class _Adam:
    """Gradient ascent scaled by running averages of the gradient and of its square."""

    _FIRST_DECAY = 0.9
    _SECOND_DECAY = 0.999
    _EPSILON = 1e-8

    def __init__(self) -> None:
        self._updates = 0
        self._first: list[FloatArray] = [np.zeros(shape) for shape in _WEIGHT_SHAPES.values()]
        self._second: list[FloatArray] = [np.zeros(shape) for shape in _WEIGHT_SHAPES.values()]

    def ascend(self, weights: PolicyWeights, gradient: PolicyWeights, learning_rate: float) -> PolicyWeights:
        self._updates += 1
        first_scale = 1 - self._FIRST_DECAY**self._updates
        second_scale = 1 - self._SECOND_DECAY**self._updates
        moved: list[FloatArray] = []
        for index, (array, slope) in enumerate(zip(weights.arrays(), gradient.arrays(), strict=True)):
            self._first[index] = self._FIRST_DECAY * self._first[index] + (1 - self._FIRST_DECAY) * slope
            self._second[index] = (
                self._SECOND_DECAY * self._second[index] + (1 - self._SECOND_DECAY) * slope**2
            )
            mean = self._first[index] / first_scale
            deviation = np.sqrt(self._second[index] / second_scale)
            moved.append(array + learning_rate * mean / (deviation + self._EPSILON))
        return PolicyWeights(*moved)


@dataclass
class PolicyGradientLearner:
    """Improves a policy from the episodes it played.

    Keeps Adam's moments from step to step and has no randomness of its own: the same sequence of steps gives
    the same weights.
    """

    learning_rate: float = 0.03
    discount: float = 0.99
    clip: float = 0.2
    updates_per_step: int = 2
    _adam: _Adam = field(default_factory=_Adam, init=False, repr=False)

    def step(
        self, weights: PolicyWeights, trajectories: Sequence[Trajectory]
    ) -> tuple[PolicyWeights, StepStats]:
        """Better weights, from a batch of episodes that `weights` (or a recent version of them) played.

        The result depends on the episodes, not on the order in which they arrived. Raises `ValueError` when
        there are none.
        """
        if not trajectories:
            raise ValueError("a learning step needs at least one trajectory")
        # Sums of floats depend on their order; episodes are told apart by where they started.
        ordered = sorted(trajectories, key=lambda trajectory: trajectory.observations[0].tolist())
        batch, explained_variance = self._prepare(ordered)
        logs = log_probabilities(weights, batch.observations)
        gradient_norm = 0.0
        updated = weights
        for update in range(self.updates_per_step):
            _, gradient = surrogate_objective(updated, batch, self.clip)
            if update == 0:
                gradient_norm = math.sqrt(sum(float((array**2).sum()) for array in gradient.arrays()))
            updated = self._adam.ascend(updated, gradient, self.learning_rate)
        return updated, StepStats(
            episodes=len(ordered),
            steps=len(batch.actions),
            mean_return=sum(trajectory.episode_return for trajectory in ordered) / len(ordered),
            explained_variance=explained_variance,
            entropy=float(-(np.exp(logs) * logs).sum(axis=1).mean()),
            gradient_norm=gradient_norm,
        )

    def _prepare(self, trajectories: Sequence[Trajectory]) -> tuple[Batch, float]:
        """The batch with advantages of mean 0 and deviation 1, and the variance that the baseline explained."""
        returns = np.concatenate(
            [discounted_returns(trajectory.rewards, self.discount) for trajectory in trajectories]
        )
        advantages = returns - fit_baseline(trajectories, returns)
        explained_variance = 1 - float(advantages.var()) / max(float(returns.var()), 1e-12)
        batch = Batch(
            observations=np.concatenate([trajectory.observations for trajectory in trajectories]),
            actions=np.concatenate([trajectory.actions for trajectory in trajectories]),
            log_probabilities=np.concatenate([trajectory.log_probabilities for trajectory in trajectories]),
            advantages=(advantages - advantages.mean()) / (advantages.std() + 1e-8),
        )
        return batch, explained_variance
