"""Part `growth`: how calls fare with more clients, larger batches, larger spans, and more workers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from benchmarks.figures import Curve, Section, cost_knee, knee, short
from benchmarks.servers import Served, child, echo, ours, python

CLIENTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
BATCHES = [1, 4, 16, 64, 256, 1024]
SPAN_BYTES = [100, 1_000, 10_000, 100_000, 1_000_000]
WORKERS = [1, 4, 16, 64, 250, 500, 1000, 2000]

Points = dict[int, dict[str, float]]


@dataclass(frozen=True)
class _Plan:
    """What is measured how."""

    points: list[int]
    seconds: float
    rounds: int
    step: Callable[[str], None]


async def measure(largest: float, seconds: float, rounds: int, step: Callable[[str], None]) -> Section:
    """Draw all curves.

    Args:
        largest: The part of the largest sizes to go to: 1 for all.
        seconds: How long one measurement takes.
        rounds: How often each curve is gone along; at each point the best counts.
        step: Told what is measured.
    """

    def plan(points: list[int]) -> _Plan:
        return _Plan([point for point in points if point <= points[-1] * largest], seconds, rounds, step)

    section = Section(
        "growth",
        "Growth",
        "One server on memory and one client process on the same machine, which has to share its cores between them: "
        f"where a curve levels off, both together are at their limit. Each measurement took about {seconds:g} s, and "
        f"each curve was gone along {rounds} times on a fresh server; the best counts. A *knee* is the size after "
        "which nothing gains 10 % more, or from which a cost is more than twice the least. The curves over stored "
        "rollouts are those of the part `flat`.",
    )
    section.curves += [
        await _clients(plan(CLIENTS)),
        await _batches(plan(BATCHES)),
        await _span_sizes(plan(SPAN_BYTES)),
        *await _workers(plan(WORKERS)),
    ]
    return section


async def _clients(plan: _Plan) -> Curve:
    points = await _go_along("clients", lambda: ours("memory"), plan)
    bare = await _go_along("bare", echo, plan)
    series = {**_series(points), **_series(bare)}
    return Curve("clients", "clients, a connection each", "calls/s", series, _knees("clients", series))


async def _batches(plan: _Plan) -> Curve:
    series = _series(await _go_along("batch", lambda: ours("memory"), plan))
    return Curve(
        "batch", "spans of 1 KB, or rollouts, in a call", "per second", series, _knees("in a call", series)
    )


async def _span_sizes(plan: _Plan) -> Curve:
    series = _series(await _go_along("span-size", lambda: ours("memory"), plan))
    remark = _knees("bytes", {"MB/s": series["MB/s"]})
    return Curve("span-size", "bytes of text in a span, streamed", "per second", series, remark)


async def _workers(plan: _Plan) -> list[Curve]:
    series = _series(await _go_along("workers", lambda: ours("memory"), plan))
    done, dispatch = {"rollouts/s": series["rollouts/s"]}, {"dispatch, ms": series["dispatch, ms"]}
    x = "workers, a connection each"
    bend = cost_knee(dispatch["dispatch, ms"])
    remark = "No knee: it never takes twice the least" if bend is None else f"Knee: {short(bend)} workers"
    return [
        Curve("workers", x, "rollouts/s: claim, a span, finish", done, _knees("workers", done)),
        Curve("workers-dispatch", x, "ms from enqueue to claim, all idle", dispatch, remark),
    ]


async def _go_along(
    curve: str, server: Callable[[], AbstractAsyncContextManager[Served]], plan: _Plan
) -> Points:
    best: Points = {}
    for _ in range(plan.rounds):
        async with server() as served:
            command = python(
                *("-m", "benchmarks.growing", curve, served.address, str(plan.points), str(plan.seconds))
            )
            async with child(*command) as process:
                for point in plan.points:
                    plan.step(f"{curve}: {short(point)}")
                    found = await process.answer()
                    best[point] = found if point not in best else _better(best[point], found)
    return best


def _better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of rates the higher, of milliseconds the lower."""
    return {name: (min if name.endswith("ms") else max)(one[name], other[name]) for name in one}


def _series(points: Points) -> dict[str, list[tuple[float, float]]]:
    names = next(iter(points.values()))
    return {name: [(float(point), figures[name]) for point, figures in points.items()] for name in names}


def _knees(unit: str, series: dict[str, list[tuple[float, float]]]) -> str:
    found = [
        f"{name}: {short(knee(points))} {unit} ({short(max(y for _, y in points))} at most)"
        for name, points in series.items()
    ]
    return "Knees: " + "; ".join(found)
