"""Part `budget`: the processor time of a call, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from benchmarks.budgeting import CALLS
from benchmarks.figures import Row, Section, alternate
from benchmarks.servers import Served, child, echo, ours, python
from benchmarks.store import UNARY_ROWS


async def measure(rounds: int, n: int, step: Callable[[str], None]) -> Section:
    """Make `n` calls of each kind in each way, `rounds` times."""

    async def over_grpc(
        what: str, server: Callable[[], AbstractAsyncContextManager[Served]]
    ) -> dict[str, float]:
        figures: dict[str, float] = {}
        async with (
            server() as served,
            child(*python("-m", "benchmarks.budgeting", what, served.address, str(n))) as client,
        ):
            await client.answer()
            for name in CALLS:
                used = served.cpu_seconds()
                figures[f"{name} client"] = (await client.ask())["us"]
                figures[f"{name} server"] = (served.cpu_seconds() - used) / n * 1e6
        return figures

    async def in_process(what: str) -> dict[str, float]:
        async with child(*python("-m", "benchmarks.budgeting", what, str(n))) as process:
            await process.answer()
            return {name: (await process.ask())["us"] for name in CALLS}

    medians = await alternate(
        rounds,
        {
            "bare": lambda: over_grpc("bare", echo),
            "ours": lambda: over_grpc("client", ours),
            "service": lambda: in_process("service"),
        },
        step,
    )
    return Section(
        "budget",
        "Where the time of a call goes",
        f"Microseconds of processor time per call, 16 callers, {n:,} calls, medians of {rounds} rounds; they hardly "
        "depend on what else the machine does. *Bare* is the echo with as many bytes, one call after the other per "
        "caller; ours share a stream, so that the transport is paid once for several. Of our server's time, *service* "
        "is what decoding, the verb on memory, and encoding take without gRPC; the rest is gRPC, and what is done "
        "around every call (repeats, limits, counters). With client and server on a core each, calls per second are "
        "limited by the slower of them: *possible* is how many times the bare echo's rate that lets our calls reach.",
        [_row(name, medians) for name in CALLS],
    )


def _row(name: str, medians: dict[str, dict[str, float]]) -> Row:
    bare, ours_ = medians["bare"], medians["ours"]
    client, server = ours_[f"{name} client"], ours_[f"{name} server"]
    limit = max(bare[f"{name} client"], bare[f"{name} server"])
    return Row(
        UNARY_ROWS[name],
        "µs",
        {
            "bare client": bare[f"{name} client"],
            "bare server": bare[f"{name} server"],
            "our client": client,
            "our server": server,
            "service": medians["service"][name],
            "possible, of bare": limit / max(client, server),
        },
    )
