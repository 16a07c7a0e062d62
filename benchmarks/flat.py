"""Part `flat`: what a call costs with a million rollouts stored, beside what it costs with a thousand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from benchmarks.figures import Check, Curve, Row, Section, alternate, short
from benchmarks.servers import Child, child, python

_BOUNDS = {"memory": 1.3, "sqlite": 1.5}
_BYTES_PER_ROLLOUT = 1200.0


async def measure(counts: list[int], rounds: int, calls: int, step: Callable[[str], None]) -> Section:
    """Measure stores of each of these sizes; the smallest is what the others are compared with."""
    section = Section(
        "flat",
        "Cost against what is stored",
        "The engine's verbs in a process of their own, one caller, microseconds per call, with so many rollouts in "
        'the queue (SQLite with `durability="normal"`, for waiting for the disk would hide the rest). Stores of all '
        f"sizes are held at once and measured in turn, {calls} calls at a time; "
        f"medians of {rounds} rounds. Memory is what the process grew by while they were enqueued.",
    )
    async with AsyncExitStack() as stack:
        stores: dict[str, dict[int, Child]] = {backend: {} for backend in _BOUNDS}
        for backend, children in stores.items():
            for count in counts:
                command = python("-m", "benchmarks.grown", backend, str(count), str(calls))
                children[count] = await stack.enter_async_context(child(*command))
        step(f"filling stores of {', '.join(map(short, counts))} rollouts")
        bytes_per_rollout = [
            answer["bytes_per_rollout"]
            for answer in await asyncio.gather(
                *(process.answer() for children in stores.values() for process in children.values())
            )
        ]
        for backend, children in stores.items():
            sides = {_column(count): process.ask for count, process in children.items()}
            medians = await alternate(rounds, sides, lambda side, of=backend: step(f"{of}: {side}"))  # type: ignore[misc]
            section.rows.extend(_rows(backend, medians, counts))
            section.curves.append(_curve(backend, medians, counts))
    largest = bytes_per_rollout[len(counts) - 1]  # of the first backend, memory
    check = Check("ours", largest, _BYTES_PER_ROLLOUT, at_most=True)
    section.rows.append(Row("memory per queued rollout", "bytes", {_column(counts[-1]): largest}, [check]))
    return section


def _column(count: int) -> str:
    return f"{short(count)} stored"


def _rows(backend: str, medians: dict[str, dict[str, float]], counts: list[int]) -> list[Row]:
    rows = []
    for verb in medians[_column(counts[0])]:
        figures = {_column(count): medians[_column(count)][verb] for count in counts}
        ratio = figures[_column(counts[-1])] / figures[_column(counts[0])]
        check = Check("most / fewest", ratio, _BOUNDS[backend], at_most=True)
        rows.append(Row(f"{backend}: {verb}", "µs/call", figures, [check]))
    return rows


def _curve(backend: str, medians: dict[str, dict[str, float]], counts: list[int]) -> Curve:
    verbs = medians[_column(counts[0])]
    series = {verb: [(float(count), medians[_column(count)][verb]) for count in counts] for verb in verbs}
    worst = max(verbs, key=lambda verb: series[verb][-1][1] / series[verb][0][1])
    growth = series[worst][-1][1] / series[worst][0][1]
    return Curve(
        f"{backend}-stored-rollouts",
        "rollouts stored",
        f"µs per call, {backend}",
        series,
        f"From {short(counts[0])} to {short(counts[-1])} rollouts no call gets dearer than {growth:.2f} × ({worst}): "
        "there is no knee"
        if growth <= _BOUNDS[backend]
        else f"{worst} gets dearer, {growth:.2f} ×",
    )
