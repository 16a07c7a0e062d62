"""Episodes on their way through the store: played by the agent as spans, read back by the adapter as trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any, Literal

from opentelemetry import trace

from lightning.demo.policy import PolicyWeights, Segment, Trajectory, play_episode
from lightning.runner import rollout as agent_function
from lightning.training.adapter import Adapter
from lightning.types import AttemptedRollout, Resource, Span

RESOURCE_NAME = "policy"
"""Under this name the algorithm publishes the policy and the agent asks for it."""

_SPAN_NAME = "cartpole.segment"
_ATTRIBUTE_PREFIX = "cartpole."


class CartPolePolicy(Resource):
    """A version of the policy: a resource type of the demo's own."""

    resource_type: Literal["cartpole_policy"] = "cartpole_policy"
    iteration: int
    """How many learning steps made it; 0 is untrained."""
    weights: dict[str, Any]
    """`PolicyWeights.to_lists()`."""


@agent_function
def agent(task: dict[str, int], policy: CartPolePolicy, rollout: AttemptedRollout) -> float:
    """Play one episode and return its return, sending it segment by segment while it is played.

    Args:
        task: `seed` of the episode, and `iteration` of the policy that is to play it.
        policy: The version of the policy that the rollout is bound to.
        rollout: In mode `val` the policy plays greedily.

    Raises:
        ValueError: The policy is not the one the task asks for: what it learns would be wrong.
    """
    if policy.iteration != task["iteration"]:
        raise ValueError(
            f"the task is for iteration {task['iteration']}, the policy is of iteration {policy.iteration}"
        )
    weights = PolicyWeights.from_lists(policy.weights)
    tracer = trace.get_tracer("lightning.demo")
    episode_return, ended = 0.0, False
    with closing(play_episode(weights, task["seed"], greedy=rollout.mode == "val")) as segments:
        while not ended:
            with tracer.start_as_current_span(_SPAN_NAME) as span:
                segment = next(segments)
                span.set_attributes(
                    {_ATTRIBUTE_PREFIX + name: value for name, value in asdict(segment).items()}
                )
            episode_return += sum(segment.rewards)
            ended = segment.final
    return episode_return


class EpisodeAdapter(Adapter[Trajectory]):
    """Reads the spans of one attempt as the episode that it played."""

    def adapt(self, spans: Sequence[Span]) -> Trajectory:
        """Join the segments among `spans`. Raises `ValueError` if they are not one whole episode."""
        return Trajectory.from_segments(
            [
                Segment(
                    **{name: span.attributes[_ATTRIBUTE_PREFIX + name] for name in Segment.__annotations__}
                )
                for span in spans
                if span.name == _SPAN_NAME
            ]
        )
