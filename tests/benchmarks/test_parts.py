"""Parts of the benchmark that need no peer, run at a size that proves that they measure."""

from __future__ import annotations

import asyncio
import sys

import pytest
from lightningpb.v1 import span_pb2

import lightning
from benchmarks import budget, engines, flat, growth, idle, restart, stream
from benchmarks.__main__ import main
from benchmarks.servers import ours, run
from benchmarks.shared.store_bench import spans_of
from benchmarks.streaming import fill
from lightning import codec


def test_parts_can_be_chosen_and_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sote"]) == 2
    assert "no part is called 'sote'; there are store, budget," in capsys.readouterr().err
    assert main(["soak", "--minutes", "-1"]) == 2
    assert "--minutes must be a positive number" in capsys.readouterr().err


def _ignore(_: str) -> None:
    return


def test_protobuf_alone_makes_the_messages_that_are_streamed() -> None:
    (span,) = spans_of(lightning, "ro-1", "at-1", [5], 1024)
    message = span_pb2.Span()
    fill(message, span)
    assert message == codec.span_to_proto(span)


def test_stream() -> None:
    section = asyncio.run(stream.measure(1, 256, _ignore))
    (row,) = section.rows
    assert row.figures.keys() == {"ours, memory", "ours, SQLite", "protobuf alone"}
    assert all(figure > 0 for figure in row.figures.values())
    (check,) = row.checks
    assert check.value == row.figures["ours, memory"] / row.figures["protobuf alone"]


def test_idle_workers_are_connected_each_by_itself() -> None:
    section = asyncio.run(idle.measure(5, 0.5, _ignore))
    cpu, memory, _ = (row.figures["ours"] for row in section.rows)
    assert cpu >= 0
    assert memory > 1


def test_flat_compares_the_largest_store_with_the_smallest() -> None:
    section = asyncio.run(flat.measure([1000, 2000], 1, 10, _ignore))
    claim = next(row for row in section.rows if row.name == "sqlite: claim")
    assert claim.checks[0].value == claim.figures["2,000 stored"] / claim.figures["1,000 stored"]
    assert section.rows[-1].figures["2,000 stored"] > 0
    assert [curve.name for curve in section.curves] == ["memory-stored-rollouts", "sqlite-stored-rollouts"]


def test_filling() -> None:
    async def fill_and_count() -> int:
        async with ours("memory") as served:
            await run(sys.executable, "benchmarks/filling.py", "lightning", served.address, "640")
            client = lightning.LightningStoreClient(served.address)
            statistics = await client.statistics()
            await client.close()
            return statistics["total_spans"]

    assert asyncio.run(fill_and_count()) == 640


def test_engines_measure_every_backend_that_is_here() -> None:
    section = asyncio.run(engines.measure(1, 64, _ignore))
    verbs = {row.name: row for row in section.rows}
    backends = {"memory", "SQLite, full", "SQLite, normal"}
    assert all(backends <= row.figures.keys() for row in verbs.values())
    assert "SQLite alone" in verbs["claim"].figures
    assert ("MongoDB" in verbs["claim"].figures) != ("There is none" in section.text)
    assert verbs["claim"].checks[0].value == verbs["claim"].figures["SQLite, full"]


def test_restart() -> None:
    section = asyncio.run(restart.measure(20, 40, 2, _ignore))
    (row,) = section.rows
    assert 0 < row.figures["median"] <= row.figures["slowest"]
    assert "20 rollouts and 40 spans" in section.text


def test_growth_draws_every_curve_and_names_its_knee() -> None:
    section = asyncio.run(growth.measure(0.005, 0.05, 1, _ignore))
    curves = {curve.name: curve for curve in section.curves}
    assert curves.keys() == {"clients", "batch", "span-size", "workers", "workers-dispatch"}
    assert curves["clients"].series.keys() == {"heartbeat", "enqueue", "add_span, 1 KB", "bare echo"}
    assert [x for x, _ in curves["workers"].series["rollouts/s"]] == [1, 4]
    assert all(y > 0 for curve in curves.values() for points in curve.series.values() for _, y in points)
    assert all("knee" in curve.remark.lower() for curve in curves.values())


def test_budget_accounts_for_client_and_server() -> None:
    section = asyncio.run(budget.measure(1, 64, _ignore))
    assert len(section.rows) == 5
    for row in section.rows:
        figures = row.figures
        assert figures["our client"] > 0
        assert figures["service"] > 0
        assert figures["possible, of bare"] > 0
