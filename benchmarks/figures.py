"""What is measured: rows with figures side by side, what they must reach, and curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Check:
    """A figure that must reach a bound."""

    what: str
    """How the figure came about: `ours / peer`."""
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        return f"{self.what} = {short(self.value)} ({'≤' if self.at_most else '≥'} {short(self.bound)})"


@dataclass
class Row:
    """One line of a table: the same thing measured for each of its columns."""

    name: str
    unit: str
    figures: dict[str, float]
    """By the name of the column."""
    checks: list[Check] = field(default_factory=list)


@dataclass
class Curve:
    """How a figure depends on a size; one line per series."""

    name: str
    """Also the name of its plot."""
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    remark: str = ""
    linear: bool = False
    """Whether its axes are linear; both are logarithmic otherwise."""


@dataclass
class Section:
    """What one part of the benchmark found."""

    part: str
    title: str
    text: str
    """How it was measured, in a few sentences."""
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    when: str = ""
    seconds: float = 0.0
    machine: str = ""
    """Where it was measured."""


def save(section: Section, folder: Path) -> None:
    """Keep a section, in place of the one that this part found before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{section.part}.json").write_text(json.dumps(asdict(section), indent=1) + "\n", "utf-8")


def load(part: str, folder: Path) -> Section | None:
    """What a part found last, if anything."""
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rows = [Row(**{**row, "checks": [Check(**c) for c in row["checks"]]}) for row in fields.pop("rows")]
    curves = []
    for curve in fields.pop("curves"):
        series = {name: [(x, y) for x, y in points] for name, points in curve.pop("series").items()}
        curves.append(Curve(**curve, series=series))
    return Section(**fields, rows=rows, curves=curves)


Measurement = Callable[[], Awaitable[dict[str, float]]]


async def alternate(
    rounds: int, sides: Mapping[str, Measurement], step: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Measure each side once per round, the order turning from round to round.

    Args:
        rounds: How often.
        sides: What to measure, by the name of the column.
        step: Told the side before each measurement.

    Returns:
        By side, then by figure, the median.
    """
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    order = list(sides)
    for _ in range(rounds):
        for side in order:
            step(side)
            seen[side].append(await sides[side]())
        order.append(order.pop(0))
    return {
        side: {name: statistics.median(figures[name] for figures in of_side) for name in of_side[0]}
        for side, of_side in seen.items()
    }


def knee(points: list[tuple[float, float]], least_gain: float = 0.1) -> float:
    """Where a rising curve stops to pay: the first size after which no other gives `least_gain` (a part) more."""
    for x, y in points:
        if all(later <= y * (1 + least_gain) for after, later in points if after > x):
            return x
    return points[-1][0]


def cost_knee(points: list[tuple[float, float]], most_growth: float = 2.0) -> float | None:
    """Where a cost begins to grow: the first size from which on it is always above `most_growth` times the least."""
    least = min(y for _, y in points)
    bend = None
    for x, y in reversed(points):
        if y <= most_growth * least:
            break
        bend = x
    return bend


def short(value: float) -> str:
    """For people: three digits that count, thousands apart."""
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
