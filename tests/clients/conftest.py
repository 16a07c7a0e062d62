"""The example runners in other languages: built once, then run as the programs they are."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from lightning.rpc import LightningStoreServer
from lightning.store import InMemoryLightningStore

CLIENTS = Path(__file__).parents[2] / "clients"
DEADLINE_SECONDS = 60.0

StartProgram = Callable[..., Awaitable[asyncio.subprocess.Process]]


def build(language: str, *commands: str, command: list[str]) -> None:
    """Run what builds a client, one process at a time. It is quick where all is built."""
    missing = [name for name in commands if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: needed for clients/{language}, see its README")
    with (CLIENTS / language / ".build-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command,
            cwd=CLIENTS / language,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The example runner for Node.js: how to start it."""
    wanted, installed = (
        CLIENTS / "node" / name for name in ("package-lock.json", "node_modules/.package-lock.json")
    )
    fresh = installed.exists() and installed.stat().st_mtime >= wanted.stat().st_mtime
    build("node", "node", "npm", command=["true"] if fresh else ["npm", "ci", "--ignore-scripts"])
    return ["node", str(CLIENTS / "node" / "main.mjs")]


@pytest.fixture(scope="session")
def go() -> list[str]:
    """The example runner for Go: how to start it."""
    build("go", "go", command=["./build"])
    return [str(CLIENTS / "go" / "bin" / "runner")]


@pytest.fixture(params=["node", "go"])
def runner(request: pytest.FixtureRequest) -> list[str]:
    """Each of the example runners."""
    command: list[str] = request.getfixturevalue(request.param)
    return command


@pytest.fixture
async def server() -> AsyncIterator[LightningStoreServer]:
    """A server with an empty store."""
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def start() -> AsyncIterator[StartProgram]:
    """Starts programs, and kills after the test those that still run."""
    async with AsyncExitStack() as stack:

        async def start_program(*command: str, **environment: str) -> asyncio.subprocess.Process:
            program = await asyncio.create_subprocess_exec(
                *command,
                env={**os.environ, **environment},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            stack.push_async_callback(end, program)
            return program

        yield start_program


async def end(program: asyncio.subprocess.Process) -> None:
    if program.returncode is None:
        program.kill()
    await program.communicate()
