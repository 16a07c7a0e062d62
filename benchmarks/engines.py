"""Part `engines`: the verbs on each backend, through the engine, beside SQLite alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Check, Measurement, Row, Section, alternate
from benchmarks.mongod import fresh_url, mongod
from benchmarks.servers import python, run, scratch
from benchmarks.verbs import CALLERS, SPAN_CALLERS, SPANS_PER_CALL

_SQLITE = "SQLite, full"
_LEAST = {"spans": 20_000.0, "claim": 3_000.0}
"""Of SQLite, with everything on the disk that is acknowledged."""
_ROWS = {
    "spans": (f"add_many_spans, {SPANS_PER_CALL} × 1 KB", "spans/s"),
    "enqueue": ("enqueue", "calls/s"),
    "claim": ("claim", "calls/s"),
    "update": ("update_attempt", "calls/s"),
    "start to finish": ("start, 4 spans, finish", "rollouts/s"),
}


async def measure(rounds: int, n: int, step: Callable[[str], None]) -> Section:
    """Measure each backend, `rounds` times, in turn, each time empty and in a process of its own."""

    async def child(backend: str) -> dict[str, float]:
        rates: dict[str, float] = json.loads(await run(*python("-m", "benchmarks.verbs", backend, str(n))))
        return rates

    def in_file(kind: str) -> Measurement:
        async def measurement() -> dict[str, float]:
            with tempfile.TemporaryDirectory(dir=scratch()) as folder:
                return await child(f"{kind}:{Path(folder) / 'bench.db'}")

        return measurement

    step("starting MongoDB")
    with mongod() as host:
        sides: dict[str, Measurement] = {
            "memory": lambda: child("memory"),
            _SQLITE: in_file("full"),
            "SQLite, normal": in_file("normal"),
            "SQLite alone": in_file("alone"),
        }
        if host is not None:
            sides["MongoDB"] = lambda: child(fresh_url(host))
        medians = await alternate(rounds, sides, step)
    return Section(
        "engines",
        "Backends",
        f"The engine's verbs in one process, without gRPC: {CALLERS} callers at once (spans: {SPAN_CALLERS} callers "
        f"with {SPANS_PER_CALL} spans a call), acknowledged when committed; medians of {rounds} rounds, in turn. "
        "*SQLite alone* writes rows of that size into plain tables without a line of this project, "
        "`synchronous=FULL`, as many in a transaction as callers can wait for together. MongoDB is one member of a "
        "replica set on this machine, write concern majority and journalled."
        f"{'' if host else ' There is none on this machine.'}",
        [_row(verb, medians) for verb in _ROWS],
    )


def _row(verb: str, medians: dict[str, dict[str, float]]) -> Row:
    name, unit = _ROWS[verb]
    figures = {side: rates[verb] for side, rates in medians.items() if verb in rates}
    checks = [Check(_SQLITE, figures[_SQLITE], _LEAST[verb])] if verb in _LEAST else []
    return Row(name, unit, figures, checks)
