"""Part `memory`: what a stored span occupies in the server, beside the peer's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from benchmarks import peer
from benchmarks.figures import Check, Row, Section
from benchmarks.servers import Served, ours, peers, run

_SCRIPT = "benchmarks/filling.py"
_WARM_UP_SPANS = 640
_MOST_KILOBYTES = 1.5


async def measure(count: int, step: Callable[[str], None]) -> Section:
    """See by how much a server of each kind grows with spans; the peer, which is slow, is given a fifth."""
    environment = await peer.environment()

    async def kilobytes_per_span(
        server: AbstractAsyncContextManager[Served], interpreter: str, module: str, scheme: str, count: int
    ) -> float:
        async with server as served:
            await run(interpreter, _SCRIPT, module, f"{scheme}{served.address}", str(_WARM_UP_SPANS))
            before = served.rss_bytes()
            await run(interpreter, _SCRIPT, module, f"{scheme}{served.address}", str(count))
            return (served.rss_bytes() - before) / count / 1000

    step("ours")
    our = await kilobytes_per_span(ours("memory"), sys.executable, "lightning", "", count)
    step("peer")
    python = str(environment / "bin" / "python")
    theirs = await kilobytes_per_span(peers(environment), python, "agentlightning", "http://", count // 5)
    return Section(
        "memory",
        "Memory",
        f"What a server with everything in memory grew by (resident memory) while {count:,} spans of 1 KB were "
        f"stored by `add_many_spans`, per span; the peer while {count // 5:,} were.",
        [
            Row(
                "memory per stored 1 KB span",
                "KB",
                {"ours": our, "peer": theirs},
                [Check("ours", our, _MOST_KILOBYTES, at_most=True)],
            )
        ],
    )
