"""The command behind `scripts/bench`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import e2e, engines, flat, growth, idle, memory, peer, report, restart, store, stream
from benchmarks.figures import Section, load, save, short
from benchmarks.servers import CACHE, ROOT

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


PARTS = {
    "store": Part(
        "calls, beside the peer and the bare transport",
        lambda step: store.measure(3, 2000, step),
        lambda step: store.measure(1, 400, step),
        with_peer=True,
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
        lambda step: idle.measure(1000, 40.0, step),
        lambda step: idle.measure(50, 2.0, step),
    ),
    "engines": Part(
        "the verbs on each backend, without gRPC",
        lambda step: engines.measure(3, 4_000, step),
        lambda step: engines.measure(1, 200, step),
    ),
    "restart": Part(
        "how soon a server answers on a large file",
        lambda step: restart.measure(100_000, 10, 5, step),
        lambda step: restart.measure(2_000, 10, 2, step),
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
}


def main() -> int:
    """Measure what is asked for, and write it down. Returns the exit status: 1 if a threshold was missed."""
    arguments = _parser().parse_args()
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        print(
            f"scripts/bench: no part is called {unknown[0]!r}; there are {', '.join(PARTS)}", file=sys.stderr
        )
        return 2
    parts = arguments.parts or [name for name, part in PARTS.items() if part.by_default]
    console = Console()
    figures = CACHE / "quick" if arguments.quick else ROOT / "docs" / "benchmarks" / "figures"
    target = CACHE / "quick" / "benchmarks.md" if arguments.quick else ROOT / "docs" / "benchmarks.md"
    try:
        sections = [_measure(name, arguments.quick, console) for name in parts]
    except RuntimeError as error:
        console.print(f"scripts/bench: {error}", style="red", markup=False)
        return 1
    for section in sections:
        save(section, figures)
    known = [found for name in PARTS if (found := load(name, figures)) is not None]
    report.write(known, target)
    console.print(f"written: {target.relative_to(ROOT)}", markup=False)
    return 0 if all(check.met for section in sections for row in section.rows for check in row.checks) else 1


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<9}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures how fast the store is, beside its peer and the bare limits, and writes "
        f"docs/benchmarks.md.\n\nparts:\n{lines}",
        epilog="The exit status is 1 if a threshold was missed.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; everything by default")
    parser.add_argument(
        "--quick", action="store_true", help="a short trial run, written to .bench/quick instead of docs/"
    )
    return parser


def _measure(name: str, quick: bool, console: Console) -> Section:
    part = PARTS[name]
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(name, total=None)

        def step(what: str) -> None:
            progress.update(task, description=f"{name}: {what}")
            if not console.is_terminal:
                console.print(f"{name}: {what}", markup=False)

        if part.with_peer and not (CACHE / "peer" / "installed").exists():
            step(f"installing {peer.PEER} in .bench/peer, once")
        started = time.monotonic()
        section = asyncio.run((part.quick if quick else part.full)(step))
        progress.update(task, description=name, total=1, completed=1)
    section.when = report.now()
    section.seconds = time.monotonic() - started
    section.machine = report.machine()
    _show(section, console)
    return section


def _show(section: Section, console: Console) -> None:
    table = Table("", "", "unit", "thresholds", title=section.title, title_justify="left")
    for row in section.rows:
        verdicts = [f"[{'green' if check.met else 'red'}]{check}[/]" for check in row.checks]
        figures = ", ".join(f"{column} {short(value)}" for column, value in row.figures.items())
        table.add_row(row.name, figures, row.unit, "\n".join(verdicts))
    if section.rows:
        console.print(table)
    for curve in section.curves:
        console.print(f"{curve.name}: {curve.remark}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
