"""Part `soak`: long at half load, with connections cut again and again: does anything grow?"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import psutil

from benchmarks.figures import Check, Curve, Row, Section
from benchmarks.servers import Child, Served, child, end, free_port, ours, python
from lightning.testing.proxy import TcpProxy

_CONCURRENCY = 4
_RETAIN = "1m"
_SAMPLES = 120
"""In the time of each there is one cut, so that all are alike."""
_LEAST_CUT_PAUSE_SECONDS = 5.0
"""A client repeats a call for about ten seconds, then it takes the server for gone."""
_END_SECONDS = 60.0
_WHO = ("server", "runners", "algorithm")
_MOST_GROWTH = 1.05
_MOST_DRIFT = {"p50_ms": 1.25, "p99_ms": 1.5}
_MOST_MORE = {"streams": 2.0, "open_files": 5.0}
_LEAST_PACE = 0.95

Sample = dict[str, float]


@dataclass
class Soaked:
    """What was seen."""

    runners: int = 0
    """How many processes."""
    most_per_s: float = 0.0
    """How many rollouts a second there can be."""
    samples: list[Sample] = field(default_factory=list)
    """At regular times; `seconds` says when."""
    cuts: int = 0
    wrong: float = 0.0
    streams_left: float = 0.0
    """On the server, when all clients are gone."""


async def measure(minutes: float, calibration: float, runners: int, step: Callable[[str], None]) -> Section:
    """Keep a server, runners and an algorithm at work.

    Args:
        minutes: For how long, once it is known what half load is.
        calibration: How many seconds it may take to find that out.
        runners: How many processes on each of two ways to the server, of which one is cut again and again.
        step: Told how it goes.
    """
    soaked = Soaked(runners=2 * runners)
    seconds = minutes * 60
    metrics_port = free_port()
    options = ("--retain", _RETAIN, "--metrics-port", str(metrics_port))
    async with ours("sqlite", *options) as served:
        look = _Look(served, metrics_port)
        pause = max(_LEAST_CUT_PAUSE_SECONDS, seconds / _SAMPLES)
        async with _clients(served, soaked, pause, look):
            interval = max(0.5, seconds / _SAMPLES)
            command = python("-m", "benchmarks.soaking", served.address, str(seconds), str(interval))
            async with child(*command, str(calibration)) as algorithm:
                await _watch(algorithm, look, soaked, step)
        step("all clients are gone")
        soaked.streams_left = await look.streams_in_the_end()
    return _section(soaked, minutes)


class _Look:
    """What can be seen from outside.

    Args:
        served: The server.
        metrics_port: Where it shows its metrics.
    """

    def __init__(self, served: Served, metrics_port: int) -> None:
        self._served = served
        self._url = f"http://127.0.0.1:{metrics_port}/metrics"
        self.runners: list[psutil.Process] = []

    async def sample(self) -> Sample:
        """Now."""
        return {
            "server_mb": self._served.rss_bytes() / 1e6,
            "runners_mb": sum(map(_rss_of_tree, self.runners)) / 1e6,
            "open_files": float(self._served.process.num_fds()),
            "streams": await self.streams(),
        }

    async def streams(self) -> float:
        """How many are open."""
        return await asyncio.to_thread(self._read, "lightning_streams")

    async def streams_in_the_end(self) -> float:
        """How many are left after some time; soon, if there are none."""
        deadline = time.monotonic() + _END_SECONDS
        while True:
            streams = await self.streams()
            if streams == 0 or time.monotonic() > deadline:
                return streams
            await asyncio.sleep(0.2)

    def _read(self, metric: str) -> float:
        with urllib.request.urlopen(self._url, timeout=_END_SECONDS) as answer:
            text: str = answer.read().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{metric} "))


@asynccontextmanager
async def _clients(served: Served, soaked: Soaked, cut_pause: float, look: _Look) -> AsyncIterator[None]:
    """Runners, half of them on connections that are cut from time to time."""
    proxy = TcpProxy(int(served.address.rpartition(":")[2]))

    async def cut() -> None:
        while True:
            await asyncio.sleep(cut_pause)
            proxy.cut()
            soaked.cuts += 1

    async with AsyncExitStack() as stack:
        address = await proxy.start()
        stack.push_async_callback(proxy.close)
        for where in (served.address, address):
            look.runners.append(await stack.enter_async_context(_runners(where, soaked.runners // 2)))
        cutting = asyncio.create_task(cut())
        try:
            yield
        finally:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)


@asynccontextmanager
async def _runners(address: str, count: int) -> AsyncIterator[psutil.Process]:
    options = ("-n", str(count), "--concurrency", str(_CONCURRENCY))
    process = await asyncio.create_subprocess_exec(
        *python(
            "-m", "lightning", "runner", "benchmarks/soak_agent.py:agent", "--connect", address, *options
        ),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        await end(process)


def _rss_of_tree(process: psutil.Process) -> int:
    total: int = process.memory_info().rss
    for descendant in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += descendant.memory_info().rss
    return total


async def _watch(algorithm: Child, look: _Look, soaked: Soaked, step: Callable[[str], None]) -> None:
    step("how much is possible?")
    soaked.most_per_s = (await algorithm.answer())["most"]
    began = time.monotonic()
    while True:
        report = await algorithm.answer()
        soaked.wrong += report["wrong"]
        ended = "ended" in report
        if ended and soaked.samples:
            return
        seconds = time.monotonic() - began
        algorithm_mb = report["rss_bytes"] / 1e6
        sample = {"seconds": seconds, **report, "algorithm_mb": algorithm_mb, **await look.sample()}
        soaked.samples.append(sample)
        step(
            f"{seconds:.0f} s: {report['rollouts_per_s']:.0f} rollouts/s, p50 {report['p50_ms']:.0f} ms, server "
            f"{sample['server_mb']:.0f} MB, {sample['streams']:.0f} streams, {soaked.cuts} cuts"
        )
        if ended:
            return


# --- What is made of it ----------------------------------------------------------------------------------------


def thirds(samples: list[Sample], name: str) -> tuple[float, float]:
    """The medians of the middle third of the samples and of the last: the first is left to warm up."""
    third = max(1, len(samples) // 3)
    middle, last = samples[-2 * third : -third] or samples[:1], samples[-third:]
    return statistics.median(s[name] for s in middle), statistics.median(s[name] for s in last)


def rows_of(soaked: Soaked) -> list[Row]:
    """What must stay as it is, and whether it did."""
    rows = [_ratio_row(soaked, f"memory: {who}", "MB", f"{who}_mb", _MOST_GROWTH) for who in _WHO]
    for name, most in _MOST_DRIFT.items():
        rows.append(_ratio_row(soaked, f"latency, {name.partition('_')[0]}", "ms", name, most))
    for name, most in _MOST_MORE.items():
        middle, last = thirds(soaked.samples, name)
        check = Check("last - middle", last - middle, most, at_most=True)
        what = f"server's {name.replace('_', ' ')}"
        rows.append(Row(what, "", {"middle third": middle, "last third": last}, [check]))
    middle, last = thirds(soaked.samples, "rollouts_per_s")
    pace = Check("last third / half load", last / (soaked.most_per_s / 2), _LEAST_PACE)
    rows.append(Row("rollouts", "per s", {"middle third": middle, "last third": last}, [pace]))
    for what, count in (
        ("rollouts that went wrong", soaked.wrong),
        ("streams left without clients", soaked.streams_left),
    ):
        rows.append(Row(what, "", {"in all": count}, [Check("in all", count, 0.0, at_most=True)]))
    return rows


def _ratio_row(soaked: Soaked, what: str, unit: str, name: str, most: float) -> Row:
    middle, last = thirds(soaked.samples, name)
    check = Check("last / middle", last / middle if middle else 0.0, most, at_most=True)
    return Row(what, unit, {"middle third": middle, "last third": last}, [check])


def _section(soaked: Soaked, minutes: float) -> Section:
    def line(name: str) -> list[tuple[float, float]]:
        return [(sample["seconds"] / 60, sample[name]) for sample in soaked.samples]

    return Section(
        "soak",
        "Soak",
        f"{minutes:g} minutes at half load: a server on SQLite that keeps finished rollouts for {_RETAIN}; "
        f"{soaked.runners} runner processes with {_CONCURRENCY} rollouts at a time each, half of them on connections "
        f"that were cut {soaked.cuts} times; and an algorithm that enqueues, waits, and reads spans. A rollout has 4 "
        "spans of 1 KB. First it was found out how many rollouts a second there can be "
        f"({soaked.most_per_s:.0f}), then half as many were asked for. The first third of the time is for warming up "
        "(the server remembers requests for five minutes); the medians of the other two are compared.",
        rows_of(soaked),
        [
            Curve(
                "soak-memory", "minutes", "MB resident", {who: line(f"{who}_mb") for who in _WHO}, linear=True
            ),
            Curve(
                "soak-latency",
                "minutes",
                "ms from enqueue to known to be done, 8 at once",
                {name.partition("_")[0]: line(name) for name in _MOST_DRIFT},
                linear=True,
            ),
        ],
    )
