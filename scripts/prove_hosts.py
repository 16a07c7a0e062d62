#!/usr/bin/env python3
"""Two hosts, in network namespaces of this machine: store and algorithm on one, runners on the other. The link between
them is cut for a while; then it looks whether all the work was done and whether the spans of that time have arrived.

    sudo .venv/bin/python scripts/prove_hosts.py              the link is cut for 30 s
    sudo .venv/bin/python scripts/prove_hosts.py --cut 10

Needs root and `ip` (Debian: iproute2). Half of the rollouts have a lease that outlasts the cut, and must be done in
one attempt; the others' is shorter, so they are taken for dead meanwhile, and must be done all the same. While the link
is cut no result may arrive, or the proof would prove nothing. Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry import trace
from rich.console import Console
from rich.table import Table

import lightning
from lightning import AttemptedRollout, LightningStore, RolloutConfig
from lightning.execution import ExecutionEvent

ADDRESS, PORT = "10.77.0.1", 4747
RUNNERS_ADDRESS = "10.77.0.2"
RUNNERS, CONCURRENCY = 4, 2
IN_HAND = 2 * RUNNERS * CONCURRENCY
STEPS, STEP_SECONDS = 20, 0.2
BEFORE_SECONDS, AFTER_SECONDS = 10.0, 20.0
SHORT_LEASE_SECONDS = 5.0
RECOVERY_SECONDS = 15.0
"""How long after the link is back the first result may take: the pauses between attempts to connect, and an agent."""
END_SECONDS = 90.0
TRACER = trace.get_tracer("proof")


# --- What the hosts do -----------------------------------------------------------------------------------------------


async def agent(task: str, rollout: AttemptedRollout) -> float:
    """Takes steps."""
    for number in range(STEPS):
        TRACER.start_span(f"step {number}").end()
        await asyncio.sleep(STEP_SECONDS)
    return 1.0


class Algorithm:
    """Keeps so many rollouts in hand, for so many seconds, and says when one has ended."""

    def __init__(self, seconds: float, long_lease: float) -> None:
        self._seconds, self._long_lease = seconds, long_lease

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        until = time.monotonic() + self._seconds
        await asyncio.gather(*(self._keep_one(store, number, until) for number in range(IN_HAND)))

    async def _keep_one(self, store: LightningStore, number: int, until: float) -> None:
        kind, lease = ("short", SHORT_LEASE_SECONDS) if number % 2 else ("long", self._long_lease)
        config = RolloutConfig(unresponsive_seconds=lease, max_attempts=5, retry_condition=["unresponsive"])
        while time.monotonic() < until:
            rollout = await store.enqueue_rollout(kind, config=config)
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id])
            print("ended", flush=True)


def be_algorithm(seconds: float, long_lease: float, store_path: str) -> None:
    strategy = lightning.ClientServerExecutionStrategy(
        "algorithm",
        server_host=ADDRESS,
        server_port=PORT,
        allow_insecure=True,
        store_url=f"sqlite:{store_path}",
    )
    strategy.execute(Algorithm(seconds, long_lease), agent)


# --- The hosts, and the link -----------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces with a link between them."""

    store: str
    runners: str
    link: str

    def cut(self) -> None:
        ip("-netns", self.store, "link", "set", self.link, "down")

    def restore(self) -> None:
        ip("-netns", self.store, "link", "set", self.link, "up")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    names = [f"lightning-{os.getpid()}-{host}" for host in ("store", "runners")]
    links = [f"lt{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)  # and with it what is in it
        ip(
            "link",
            "add",
            links[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            links[1],
            "netns",
            names[1],
        )
        for name, link, address in zip(names, links, (ADDRESS, RUNNERS_ADDRESS), strict=True):
            ip("-netns", name, "address", "add", f"{address}/24", "dev", link)
            for each in ("lo", link):
                ip("-netns", name, "link", "set", each, "up")
        yield Hosts(*names, links[0])


class Program:
    """Runs on a host; notes when it says a line."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.times: list[float] = []
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, *command], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "ended":
                self.times.append(time.time())

    def wait_to_begin(self) -> None:
        until = time.monotonic() + END_SECONDS
        while not self.times:
            if time.monotonic() > until or self._process.poll() is not None:
                sys.exit("the hosts do not begin to work")
            time.sleep(0.1)

    def wait(self) -> int:
        return self._process.wait(END_SECONDS)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()


# --- The proof -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What is in the store in the end."""

    rollouts: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    """Those with more than one attempt, by the length of their lease."""
    spans: int = 0
    spans_of_cut: int = 0
    wrong: list[str] = field(default_factory=list)


async def look(store_path: str, cut_at: float, back_at: float) -> Found:
    store = lightning.SQLiteLightningStore(store_path)
    found = Found()
    for rollout in await store.query_rollouts():
        name = rollout.rollout_id
        attempt = await store.get_latest_attempt(name)
        assert attempt is not None
        spans = list(await store.query_spans(name, attempt.attempt_id))
        found.rollouts[rollout.status] += 1
        found.again[rollout.input] += attempt.sequence_id > 1
        found.spans += len(spans)
        found.spans_of_cut += sum(cut_at < span.start_time < back_at for span in spans)
        steps = Counter(span.name for span in spans if span.name.startswith("step"))
        if rollout.status != "succeeded":
            found.wrong.append(f"{name} has ended as {rollout.status}")
        if steps != Counter(f"step {number}" for number in range(STEPS)):
            found.wrong.append(f"{name}: its spans are {dict(steps)}")
    await store.close()
    if found.again["long"]:
        found.wrong.append(f"{found.again['long']} rollouts with a long lease took more than one attempt")
    return found


def run(options: argparse.Namespace, console: Console, folder: str) -> bool:
    store_path = str(Path(folder) / "store.db")
    seconds = BEFORE_SECONDS + options.cut + AFTER_SECONDS
    algorithm = (
        __file__,
        "--be-algorithm",
        str(seconds),
        str(2 * options.cut + RECOVERY_SECONDS),
        store_path,
    )
    runner = f"-m lightning runner {Path(__file__).resolve()}:agent --connect {ADDRESS}:{PORT} --insecure"
    fleet = f"-n {RUNNERS} --concurrency {CONCURRENCY}"
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        at_store = Program(hosts.store, algorithm)
        stack.callback(at_store.close)
        at_runners = Program(hosts.runners, f"{runner} {fleet}".split())
        stack.callback(at_runners.close)
        console.print("working …")
        at_store.wait_to_begin()
        time.sleep(BEFORE_SECONDS)
        hosts.cut()
        cut_at = time.time()
        console.print(f"the link is cut for {options.cut:g} s; {len(at_store.times)} rollouts have ended")
        time.sleep(options.cut)
        back_at = time.time()
        hosts.restore()
        console.print(f"the link is back; {len(at_store.times)} rollouts have ended")
        codes = {"algorithm": at_store.wait(), "runners": at_runners.wait()}
    return judge(
        console, at_store.times, cut_at, back_at, codes, asyncio.run(look(store_path, cut_at, back_at))
    )


def judge(
    console: Console, times: list[float], cut_at: float, back_at: float, codes: dict[str, int], found: Found
) -> bool:
    after = [at - back_at for at in times if at > back_at]
    recovery = after[0] if after else float("inf")
    while_cut = sum(cut_at + 1.0 < at < back_at for at in times)
    wrong = list(found.wrong)
    wrong += [f"the {name} ended with exit code {code}" for name, code in codes.items() if code]
    if while_cut:
        wrong.append(f"{while_cut} results arrived while the link was cut: it was not")
    if recovery > RECOVERY_SECONDS:
        wrong.append(
            f"the first result came {recovery:.1f} s after the link was back, not within {RECOVERY_SECONDS} s"
        )
    if not found.spans_of_cut:
        wrong.append("no span of the time in which the link was cut has arrived")
    table = Table("what", "figure")
    for status, number in sorted(found.rollouts.items()):
        table.add_row(f"rollouts {status}", str(number))
    table.add_row("first result after the link was back", f"{recovery:.1f} s")
    table.add_row("rollouts that took more than one attempt, short lease", str(found.again["short"]))
    table.add_row("the same, long lease", str(found.again["long"]))
    table.add_row("spans", str(found.spans))
    table.add_row("of these, made while the link was cut", str(found.spans_of_cut))
    table.add_row("not as it should be", str(len(wrong)))
    console.print(table)
    for complaint in wrong[:20]:
        console.print(complaint, style="red", markup=False)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cut", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--be-algorithm", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_algorithm:
        seconds, long_lease, store_path = options.be_algorithm
        be_algorithm(float(seconds), float(long_lease), store_path)
        return 0
    if os.geteuid() != 0 or shutil.which("ip") is None:
        parser.error("this needs root, and the command `ip` (Debian: apt-get install iproute2)")
    with tempfile.TemporaryDirectory() as folder:
        return int(not run(options, Console(), folder))


if __name__ == "__main__":
    sys.exit(main())
