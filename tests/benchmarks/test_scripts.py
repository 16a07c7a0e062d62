"""The two scripts that measure this project and its peer alike run on this project as they are."""

from __future__ import annotations

import asyncio
import json
import socket
import sys

from benchmarks.servers import ours, run
from benchmarks.store import OTHER_ROWS, SCRIPT, UNARY_ROWS, message_sizes


async def _store_bench() -> str:
    async with ours("memory") as served:
        return await run(sys.executable, SCRIPT, "lightning", served.address, "--n", "32")


def test_store_bench() -> None:
    figures = json.loads(asyncio.run(_store_bench()))
    assert figures.keys() == UNARY_ROWS.keys() | OTHER_ROWS.keys()
    assert all(row["per_s"] > 0 for row in figures.values())


def test_e2e_bench() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--tasks", "8", "--runners", "2", "--probes", "1", "--port", str(port))
    printed = asyncio.run(run(sys.executable, "benchmarks/shared/e2e_bench.py", "lightning", *options))
    figures = json.loads(printed.splitlines()[-1])
    assert figures["rollouts_per_s"] > 0
    assert figures["dispatch_p99_ms"] > 0


def test_message_sizes_are_those_of_real_calls() -> None:
    sizes = asyncio.run(message_sizes())
    assert sizes.keys() == UNARY_ROWS.keys() | {"add_many_spans_64x1KB"}
    asked, answered = sizes["add_span_1KB"]
    assert asked > 1024 > answered > 0
    assert sizes["dequeue"][1] > sizes["dequeue_empty"][1]
