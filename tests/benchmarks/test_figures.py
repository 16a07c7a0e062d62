"""What is made of the figures: medians of alternating measurements, verdicts, knees, the report."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import report
from benchmarks.figures import Check, Curve, Row, Section, alternate, cost_knee, knee, load, save


def test_sides_take_turns_and_the_median_counts() -> None:
    turns: list[str] = []
    given = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 6.0, 70.0])}

    def side(name: str):  # type: ignore[no-untyped-def]
        async def measure() -> dict[str, float]:
            return {"rate": next(given[name])}

        return measure

    medians = asyncio.run(alternate(3, {name: side(name) for name in given}, turns.append))
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert medians == {"a": {"rate": 2.0}, "b": {"rate": 6.0}}


def test_checks() -> None:
    assert Check("ours / peer", 5.0, 5.0).met
    assert not Check("ours / peer", 4.99, 5.0).met
    assert Check("ours", 10.0, 10.0, at_most=True).met
    assert not Check("ours", 10.1, 10.0, at_most=True).met


def test_knee_is_where_more_no_longer_pays() -> None:
    assert knee([(1, 100.0), (4, 390.0), (16, 1000.0), (64, 1050.0), (256, 900.0)]) == 16
    assert knee([(1, 1.0), (2, 2.0)]) == 2


def test_a_cost_has_its_knee_where_it_stays_high() -> None:
    assert cost_knee([(1, 1.0), (4, 2.5), (16, 1.9), (64, 2.1), (256, 9.0)]) == 64
    assert cost_knee([(1, 1.0), (4, 5.0), (16, 2.0)]) is None


def test_report_names_what_was_missed_and_survives_saving(tmp_path: Path) -> None:
    section = Section(
        "store",
        "Calls",
        "How.",
        [
            Row("enqueue", "calls/s", {"ours": 4000.0, "peer": 800.0}, [Check("ours / peer", 5.0, 5.0)]),
            Row("claim", "calls/s", {"ours": 1000.0, "peer": 800.0}, [Check("ours / peer", 1.25, 5.0)]),
        ],
        [Curve("growth", "clients", "calls/s", {"ours": [(1, 2.0), (2, 3.0)]}, "the knee is at 2")],
        machine="a machine",
    )
    save(section, tmp_path / "figures")
    again = load("store", tmp_path / "figures")
    assert again == section
    report.write([section], tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert "**1 of 2 thresholds are met.**" in text
    assert "| claim | ours / peer = 1.25 (≥ 5) | **missed** | store |" in text
    assert "| enqueue | 4,000 | 800 | calls/s | ours / peer = 5 (≥ 5) | met |" in text
    assert "benchmarks/growth.svg" in text
    assert (tmp_path / "benchmarks" / "growth.svg").read_text("utf-8").startswith("<?xml")
