"""Part `idle`: what connected workers cost that have nothing to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from benchmarks.figures import Check, Row, Section
from benchmarks.servers import Child, child, ours, python

_HEARTBEAT_SECONDS = 10.0
_MOST_CPU_PERCENT = 15.0
_MOST_MEGABYTES = 300.0


async def measure(workers: int, seconds: float, step: Callable[[str], None]) -> Section:
    """Connect so many workers, and look at the server for so long."""
    async with ours("memory") as served:
        alone = served.rss_bytes() / 1e6
        step(f"connecting {workers:,} workers")
        async with child(
            *python("-m", "benchmarks.idlers", served.address, str(workers), str(_HEARTBEAT_SECONDS))
        ) as idlers:
            await idlers.answer()
            step(f"{workers:,} workers, {seconds:.0f} s")
            began, used = time.monotonic(), served.cpu_seconds()
            await asyncio.sleep(seconds)
            cpu = (served.cpu_seconds() - used) / (time.monotonic() - began) * 100
            resident = served.rss_bytes() / 1e6
            beats = await _heartbeats(idlers)
    return Section(
        "idle",
        "Idle workers",
        f"{workers:,} workers in one process, each with a connection of its own on which it waits for work, listens "
        f"for commands, and sends a heartbeat with a full `system_snapshot` each {_HEARTBEAT_SECONDS:.0f} s; the "
        f"server on memory, looked at for {seconds:.0f} s. With nobody connected it has {alone:.0f} MB.",
        [
            Row(
                f"{workers:,} idle workers: CPU",
                "% of a core",
                {"ours": cpu},
                [Check("ours", cpu, _MOST_CPU_PERCENT, at_most=True)],
            ),
            Row(
                f"{workers:,} idle workers: resident memory",
                "MB",
                {"ours": resident},
                [Check("ours", resident, _MOST_MEGABYTES, at_most=True)],
            ),
            Row(f"{workers:,} idle workers: heartbeat, p99", "ms", {"ours": beats["p99_ms"]}),
        ],
    )


async def _heartbeats(idlers: Child) -> dict[str, float]:
    """Ends the workers."""
    idlers.end_input()
    return await idlers.answer()
