"""Part `e2e`: a whole training job over runner processes, by `shared/e2e_bench.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarks import peer
from benchmarks.figures import Check, Row, Section
from benchmarks.servers import free_port, run

SCRIPT = "benchmarks/shared/e2e_bench.py"


async def measure(tasks: int, probes: int, step: Callable[[str], None]) -> Section:
    """Run the job with this project before and after it runs with the peer."""
    environment = await peer.environment()

    async def job(interpreter: str, module: str, probes: int) -> dict[str, float]:
        options = ("--tasks", str(tasks), "--probes", str(probes), "--port", str(free_port()))
        printed = await run(interpreter, SCRIPT, module, *options)
        figures: dict[str, float] = json.loads(_last_json_line(printed))
        return figures

    step("ours")
    before = await job(sys.executable, "lightning", probes)
    step("peer")
    theirs = await job(str(environment / "bin" / "python"), "agentlightning", max(3, probes // 4))
    step("ours")
    after = await job(sys.executable, "lightning", probes)
    our = {
        name: (before[name] + after[name]) / 2
        for name in ("rollouts_per_s", "dispatch_p50_ms", "dispatch_p99_ms")
    }
    return Section(
        "e2e",
        "A training job, end to end",
        f"`{SCRIPT}`, unchanged: 8 runner processes, {tasks} rollouts of 7 nested spans each that sleep 80 ms in "
        "all, so that the sleeps alone allow 100 rollouts a second; then "
        f"{probes} single rollouts to an idle fleet (for the peer, which takes seconds for each, a quarter of them), "
        "from enqueue to first span; p99 of so few is the slowest. "
        "This project ran before and after the peer; the mean of the two.",
        [
            Row(
                "rollouts, 8 runners",
                "rollouts/s",
                {"ours": our["rollouts_per_s"], "peer": theirs["rollouts_per_s"]},
                [Check("ours / peer", our["rollouts_per_s"] / theirs["rollouts_per_s"], 4.5)],
            ),
            Row(
                "dispatch latency, p50",
                "ms",
                {"ours": our["dispatch_p50_ms"], "peer": theirs["dispatch_p50_ms"]},
                [Check("ours", our["dispatch_p50_ms"], 10.0, at_most=True)],
            ),
            Row(
                "dispatch latency, p99",
                "ms",
                {"ours": our["dispatch_p99_ms"], "peer": theirs["dispatch_p99_ms"]},
                [Check("ours", our["dispatch_p99_ms"], 50.0, at_most=True)],
            ),
        ],
    )


def _last_json_line(printed: str) -> str:
    return next(line for line in reversed(printed.splitlines()) if line.startswith("{"))
