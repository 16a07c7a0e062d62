"""The command behind `scripts/bench`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import peer, report
from benchmarks.figures import Section, load, save, short
from benchmarks.parts import Part, parts
from benchmarks.servers import CACHE, ROOT

_EXIT_MISSED = 1
_EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and write it down as it comes.

    Returns:
        The exit status: 1 if a threshold was missed or a part could not be measured.
    """
    given = _parser().parse_args(arguments)
    known = parts(given.minutes)
    unknown = [name for name in given.parts if name not in known]
    if unknown or (given.minutes is not None and not given.minutes > 0):
        wrong = (
            f"no part is called {unknown[0]!r}; there are {', '.join(known)}"
            if unknown
            else f"--minutes must be a positive number, not {given.minutes:g}"
        )
        print(f"scripts/bench: {wrong}", file=sys.stderr)
        return _EXIT_USAGE
    console = Console()
    folder = CACHE / "quick" if given.quick else ROOT / "docs"
    figures = folder / "benchmarks" / "figures"
    target = folder / "benchmarks.md"
    good = True
    for name in given.parts or [name for name, part in known.items() if part.by_default]:
        try:
            section = _measure(name, known[name], given.quick, console)
        except RuntimeError as error:
            console.print(f"scripts/bench: {name}: {error}", style="red", markup=False)
            good = False
            continue
        good = good and all(check.met for row in section.rows for check in row.checks)
        save(section, figures)
        report.write([found for name in known if (found := load(name, figures)) is not None], target)
    if target.exists():
        console.print(f"written: {target.relative_to(ROOT)}", markup=False)
    return 0 if good else _EXIT_MISSED


def _parser() -> argparse.ArgumentParser:
    known = parts()
    lines = "\n".join(f"  {name:<9}{part.about}" for name, part in known.items())
    asked = " and ".join(name for name, part in known.items() if not part.by_default)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures how fast the store is, beside its peer and the bare limits, and writes "
        f"docs/benchmarks.md.\n\nparts:\n{lines}",
        epilog="The exit status is 1 if a threshold was missed.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"what to measure; by default everything but {asked}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short trial run, written to .bench/quick instead of docs/"
    )
    parser.add_argument("--minutes", type=float, help="how long the soak is, by default 20")
    return parser


def _measure(name: str, part: Part, quick: bool, console: Console) -> Section:
    started = time.monotonic()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(name, total=None)

        def step(what: str) -> None:
            progress.update(task, description=f"{name}: {what}")
            if not console.is_terminal:
                console.print(f"{time.monotonic() - started:5.0f} s  {name}: {what}", markup=False)

        if part.with_peer and not (CACHE / "peer" / "installed").exists():
            step(f"installing {peer.PEER} in .bench/peer, once")
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
        if curve.remark:
            console.print(f"{curve.name}: {curve.remark}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
