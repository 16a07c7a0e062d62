"""Part `stream`: spans streamed by one client process, beside what their protobuf costs alone."""

from __future__ import annotations

import json
from collections.abc import Callable

from benchmarks.figures import Check, Row, Section, alternate
from benchmarks.servers import ours, python, run

_LEAST_PART = 0.6


async def measure(rounds: int, n: int, step: Callable[[str], None]) -> Section:
    """Stream `n` spans to a fresh server, `rounds` times, in turn with the protobuf alone."""

    async def child(where: str) -> dict[str, float]:
        rates: dict[str, float] = json.loads(await run(*python("-m", "benchmarks.streaming", where, str(n))))
        return rates

    async def to(backend: str) -> dict[str, float]:
        async with ours(backend) as served:
            return await child(served.address)

    medians = await alternate(
        rounds,
        {
            "ours, memory": lambda: to("memory"),
            "protobuf alone": lambda: child("alone"),
            "ours, SQLite": lambda: to("sqlite"),
        },
        step,
    )
    figures = {side: rates["spans"] for side, rates in medians.items()}
    part = figures["ours, memory"] / figures["protobuf alone"]
    return Section(
        "stream",
        "Spans by stream",
        f"`deliver_spans` of {n:,} spans of 1 KB by one client process, 16 callers with 64 at a time, from the "
        "records a user has to the last acknowledgement. *Protobuf alone* fills, serialises and parses the same "
        f"messages in one process and sends them nowhere. Medians of {rounds} rounds, in turn.",
        [
            Row(
                "span stream, one client process",
                "spans/s",
                figures,
                [Check("ours / protobuf alone", part, _LEAST_PART)],
            )
        ],
    )
