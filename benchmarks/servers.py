"""Servers under measurement, each in a process of its own, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".bench"
"""What may be thrown away: the peer's environment, logs, trial results."""


@dataclass
class Served:
    """A server that runs."""

    address: str
    """`host:port`."""
    process: psutil.Process

    def rss_bytes(self) -> int:
        """Its resident memory."""
        resident: int = self.process.memory_info().rss
        return resident

    def cpu_seconds(self) -> float:
        """What it has used of a core so far."""
        times = self.process.cpu_times()
        used: float = times.user + times.system
        return used


@asynccontextmanager
async def serving(*command: str, port: int) -> AsyncIterator[Served]:
    """Run a server until it is no longer needed; ready when it takes connections. Raises `RuntimeError` if it ends."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=CACHE) as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, cwd=ROOT)
        try:
            await _ready(process, port, command[0])
            yield Served(f"127.0.0.1:{port}", psutil.Process(process.pid))
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read().decode(errors='replace')[-2000:]}") from None
        finally:
            await end(process)


async def _ready(process: asyncio.subprocess.Process, port: int, name: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"{name} ended with status {process.returncode}:")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(_POLL_SECONDS)
    raise RuntimeError(f"{name} takes no connections after {_START_SECONDS:.0f} s:")


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process, if it has not ended: asked first, then killed."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def ours(backend: str = "memory", *options: str) -> AsyncIterator[Served]:
    """This project's server, started as a user starts it; `sqlite` is on a file of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        url = f"sqlite:{folder}/bench.db" if backend == "sqlite" else backend
        async with serving(*store_command(url, port, *options), port=port) as served:
            yield served


def store_command(url: str, port: int, *options: str) -> Sequence[str]:
    """What starts this project's server on the store of this URL."""
    return python("-m", "lightning", "store", "--backend", url, "--port", str(port), *options)


@asynccontextmanager
async def peers(folder: Path) -> AsyncIterator[Served]:
    """The peer's server, from its environment in `folder`."""
    port = free_port()
    arguments = ("store", "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING")
    async with serving(str(folder / "bin" / "agl"), *arguments, port=port) as served:
        yield served


@asynccontextmanager
async def echo() -> AsyncIterator[Served]:
    """The bare server of `benchmarks.echo`."""
    port = free_port()
    async with serving(sys.executable, "-m", "benchmarks.echo", str(port), port=port) as served:
        yield served


class Child:
    """A program that prints a line of JSON now and then."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def answer(self) -> dict[str, float]:
        """The next line that it prints. Raises `RuntimeError` if there will be none."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a child process ended early, with status {await self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    async def ask(self) -> dict[str, float]:
        """Send it an empty line; its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.answer()

    def end_input(self) -> None:
        """Tell it that nothing more will be asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()


@asynccontextmanager
async def child(*command: str) -> AsyncIterator[Child]:
    """Run a program to talk to."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        yield Child(process)
    finally:
        await end(process)


async def run(*command: str, timeout: float = 1200.0) -> str:
    """What a program prints to its standard output. Raises `RuntimeError` with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout)
    finally:
        await end(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err.decode(errors='replace')[-3000:]}")
    return out.decode()


def python(*arguments: str) -> Sequence[str]:
    """A command that runs Python as this process does."""
    return (sys.executable, *arguments)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def scratch() -> Path:
    """A folder on a disk (where a temporary one may be in memory) for databases."""
    folder = CACHE / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
