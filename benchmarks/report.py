"""`docs/benchmarks.md`: all that was measured, as tables and plots."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import psutil

from benchmarks.figures import Curve, Row, Section, short
from benchmarks.servers import cores

_HEAD = """# Benchmarks

Written by `scripts/bench`; do not edit. What was tried to get here, and where the time goes now, is in
[performance.md](performance.md). Every table says what was measured and when; what stands side by side in one was
measured in one run, in turn.

    scripts/bench            everything but growth and the soak
    scripts/bench growth     curves over clients, batches, span sizes and workers
    scripts/bench soak       20 minutes under load
    scripts/bench --quick    a trial: short, writes to .bench/ only

"""


def write(sections: Sequence[Section], target: Path) -> None:
    """Write the report of these sections, with its plots beside it in the folder `benchmarks`."""
    parts = [_HEAD, _verdicts(sections)]
    for section in sections:
        parts.append(f"## {section.title}\n\n{section.text}\n\n")
        minutes = f"{section.seconds / 60:.1f} minutes"
        parts.append(f"`scripts/bench {section.part}`, {section.when}, {minutes}, on {section.machine}.\n\n")
        parts.extend(_table(rows) for rows in _by_columns(section.rows))
        parts.extend(_figure(curve, target) for curve in section.curves)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(parts).rstrip() + "\n", "utf-8")


def machine() -> str:
    """This machine, in words."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{_processor()}, {cores()} cores, {memory:.0f} GB, {system}, Python {platform.python_version()}"


def now() -> str:
    """The date and time, for people."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _verdicts(sections: Sequence[Section]) -> str:
    """All thresholds at a glance."""
    rows = [(section, row) for section in sections for row in section.rows if row.checks]
    checks = [check for _, row in rows for check in row.checks]
    met = sum(check.met for check in checks)
    lines = [
        f"**{met} of {len(checks)} thresholds are met.** ",
        "" if met == len(checks) else "What is missed is explained in [performance.md](performance.md).",
        "\n\n| | threshold | | part |\n|---|---|---|---|\n",
    ]
    lines.extend(f"| {row.name} | {_checks(row)} | {section.part} |\n" for section, row in rows)
    return "".join(lines) + "\n"


def _checks(row: Row) -> str:
    """Two cells: the thresholds of a row, and whether they are met."""
    verdict = "met" if all(check.met for check in row.checks) else "**missed**"
    return f"{'<br>'.join(map(str, row.checks))} | {verdict if row.checks else ''}"


def _by_columns(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in tables: those that follow each other and have the same columns."""
    tables: list[list[Row]] = []
    for row in rows:
        if tables and set(row.figures) <= set(tables[-1][0].figures):
            tables[-1].append(row)
        else:
            tables.append([row])
    return tables


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    lines = [
        f"| | {' | '.join(columns)} | unit | threshold | |",
        "|---|" + "---:|" * len(columns) + "---|---|---|",
    ]
    for row in rows:
        cells = [short(row.figures[column]) if column in row.figures else "" for column in columns]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.unit} | {_checks(row)} |")
    return "\n".join(lines) + "\n\n"


def _figure(curve: Curve, target: Path) -> str:
    from benchmarks.plots import draw  # matplotlib takes a second to import

    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    draw(curve, folder / f"{curve.name}.svg")
    remark = f"\n\n{curve.remark}." if curve.remark else ""
    return f"![{curve.y} against {curve.x}]({folder.name}/{curve.name}.svg){remark}\n\n"
