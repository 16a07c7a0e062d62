"""What `scripts/bench` can measure, and how much of it in a full run and in a trial."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from benchmarks import budget, e2e, engines, flat, growth, idle, memory, restart, soak, store, stream
from benchmarks.figures import Section

Step = Callable[[str], None]
Measure = Callable[[Step], Coroutine[Any, Any, Section]]


@dataclass(frozen=True)
class Part:
    """What can be run by its name."""

    about: str
    full: Measure
    quick: Measure
    with_peer: bool = False
    by_default: bool = True


def parts(minutes: float | None = None) -> dict[str, Part]:
    """All of them, in the order of the report.

    Args:
        minutes: How long the soak is; None: 20, and half of one in a trial.
    """
    return {
        "store": Part(
            "calls, beside the peer and the bare transport",
            lambda step: store.measure(3, 2000, step),
            lambda step: store.measure(1, 400, step),
            with_peer=True,
        ),
        "budget": Part(
            "where the time of a call goes",
            lambda step: budget.measure(3, 3000, step),
            lambda step: budget.measure(1, 500, step),
        ),
        "stream": Part(
            "spans by stream, beside protobuf alone",
            lambda step: stream.measure(5, 40_000, step),
            lambda step: stream.measure(1, 4_000, step),
        ),
        "e2e": Part(
            "a training job over 8 runner processes, beside the peer",
            lambda step: e2e.measure(512, 20, step),
            lambda step: e2e.measure(64, 3, step),
            with_peer=True,
        ),
        "memory": Part(
            "memory per span, beside the peer",
            lambda step: memory.measure(64_000, step),
            lambda step: memory.measure(6_400, step),
            with_peer=True,
        ),
        "idle": Part(
            "a thousand connected workers without work",
            lambda step: idle.measure(1000, 60.0, step),
            lambda step: idle.measure(50, 2.0, step),
        ),
        "engines": Part(
            "the verbs on each backend, without gRPC",
            lambda step: engines.measure(3, 4_000, step),
            lambda step: engines.measure(1, 200, step),
        ),
        "restart": Part(
            "how soon a server answers on a large file",
            lambda step: restart.measure(100_000, 1_000_000, 5, step),
            lambda step: restart.measure(2_000, 20_000, 2, step),
        ),
        "flat": Part(
            "what calls cost with a million rollouts stored",
            lambda step: flat.measure([1_000, 10_000, 100_000, 1_000_000], 9, 300, step),
            lambda step: flat.measure([1_000, 20_000], 3, 100, step),
        ),
        "growth": Part(
            "curves over clients, batches, span sizes and workers",
            lambda step: growth.measure(1.0, 1.0, 2, step),
            lambda step: growth.measure(0.02, 0.2, 1, step),
            by_default=False,
        ),
        "soak": Part(
            "long at half load: does anything grow?",
            lambda step: soak.measure(minutes or 20.0, 10.0, 2, step),
            lambda step: soak.measure(minutes or 0.5, 2.0, 1, step),
            by_default=False,
        ),
    }
