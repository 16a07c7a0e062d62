"""The soak notices what grows, and runs."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.soak import Soaked, measure, rows_of, thirds

_STEADY = {
    "seconds": 0.0,
    "server_mb": 80.0,
    "runners_mb": 400.0,
    "algorithm_mb": 60.0,
    "p50_ms": 20.0,
    "p99_ms": 90.0,
    "streams": 8.0,
    "open_files": 30.0,
    "rollouts_per_s": 50.0,
}


def _soaked(**growth: float) -> Soaked:
    """Something grows by so much from sample to sample."""
    samples = [
        {name: value + growth.get(name, 0.0) * number for name, value in _STEADY.items()}
        for number in range(12)
    ]
    return Soaked(most_per_s=100.0, samples=samples)


def _missed(soaked: Soaked) -> list[str]:
    return [row.name for row in rows_of(soaked) if not all(check.met for check in row.checks)]


def test_what_stays_as_it_is_passes() -> None:
    assert _missed(_soaked()) == []


@pytest.mark.parametrize(
    ("grows", "by", "missed"),
    [
        ("server_mb", 2.0, "memory: server"),
        ("runners_mb", 10.0, "memory: runners"),
        ("algorithm_mb", 1.5, "memory: algorithm"),
        ("p50_ms", 3.0, "latency, p50"),
        ("p99_ms", 60.0, "latency, p99"),
        ("streams", 1.0, "server's streams"),
        ("open_files", 2.0, "server's open files"),
        ("rollouts_per_s", -2.0, "rollouts"),
    ],
)
def test_what_grows_is_noticed(grows: str, by: float, missed: str) -> None:
    assert _missed(_soaked(**{grows: by})) == [missed]


def test_failures_and_leaked_streams_are_noticed() -> None:
    soaked = _soaked()
    soaked.wrong, soaked.streams_left = 1.0, 2.0
    assert _missed(soaked) == ["rollouts that went wrong", "streams left without clients"]


def test_the_first_third_is_left_to_warm_up() -> None:
    samples = [{"x": float(value)} for value in (90, 80, 1, 2, 3, 4)]
    assert thirds(samples, "x") == (1.5, 3.5)
    assert thirds(samples[:1], "x") == (90.0, 90.0)


def test_soak() -> None:
    seen: list[str] = []
    section = asyncio.run(measure(0.02, 0.2, 1, seen.append))
    rows = {row.name: row.figures for row in section.rows}
    assert rows["rollouts that went wrong"] == {"in all": 0.0}
    assert rows["streams left without clients"] == {"in all": 0.0}
    assert rows["server's streams"]["last third"] > 0
    assert rows["memory: runners"]["last third"] > 50  # two processes
    assert any("rollouts/s" in line for line in seen)
