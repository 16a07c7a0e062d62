"""Part `flat`: what a call costs with a million rollouts stored, beside what it costs with a thousand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from benchmarks.figures import Check, Curve, Row, Section, alternate, short
from benchmarks.servers import ROOT, end, python

_BOUNDS = {"memory": 1.3, "sqlite": 1.5}
_BYTES_PER_ROLLOUT = 1200.0
SMALL = 1000


class Child:
    """A process of `benchmarks.grown`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.bytes_per_rollout = 0.0

    async def answer(self) -> dict[str, float]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("a process with a store in it ended early")
        answer: dict[str, float] = json.loads(line)
        return answer

    async def measure(self) -> dict[str, float]:
        """Microseconds per call, by verb."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.answer()


@asynccontextmanager
async def _grown(backend: str, count: int, calls: int) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *python("-m", "benchmarks.grown", backend, str(count), str(calls)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    child = Child(process)
    try:
        child.bytes_per_rollout = (await child.answer())["bytes_per_rollout"]
        yield child
    finally:
        await end(process)


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
    for backend, bound in _BOUNDS.items():
        await _measure_backend(section, backend, bound, counts, rounds, calls, step)
    return section


async def _measure_backend(
    section: Section,
    backend: str,
    bound: float,
    counts: list[int],
    rounds: int,
    calls: int,
    step: Callable[[str], None],
) -> None:
    async with AsyncExitStack() as stack:
        children = {}
        for count in counts:
            step(f"{backend}: filling {short(count)}")
            children[count] = await stack.enter_async_context(_grown(backend, count, calls))
        sides = {f"{short(count)} stored": child.measure for count, child in children.items()}
        medians = await alternate(rounds, sides, lambda side: step(f"{backend}: {side}"))
        first, last = f"{short(counts[0])} stored", f"{short(counts[-1])} stored"
        for verb, cost in medians[first].items():
            figures = {side: medians[side][verb] for side in sides}
            ratio = medians[last][verb] / cost
            section.rows.append(
                Row(
                    f"{backend}: {verb}",
                    "µs/call",
                    figures,
                    [Check("most / fewest", ratio, bound, at_most=True)],
                )
            )
        if backend == "memory":
            size = children[counts[-1]].bytes_per_rollout
            section.rows.append(
                Row(
                    "memory per queued rollout",
                    "bytes",
                    {last: size},
                    [Check("ours", size, _BYTES_PER_ROLLOUT, at_most=True)],
                )
            )
        section.curves.append(
            Curve(
                f"{backend}-stored-rollouts",
                "rollouts stored",
                f"µs per call, {backend}",
                {
                    verb: [(count, medians[f"{short(count)} stored"][verb]) for count in counts]
                    for verb in medians[first]
                },
                "flat: no knee",
            )
        )
