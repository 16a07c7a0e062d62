"""The command `lightning demo`, whole, and by hand in three parts."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest

from lightning import Attempt, LightningStoreClient

if TYPE_CHECKING:
    from tests.demo.conftest import Command, Commands

pytestmark = pytest.mark.anyio


def all_gone(processes: list[psutil.Process]) -> bool:
    return not [
        process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("strategy", ["cs", "shm"])
def test_it_trains_and_says_what_came_of_it(strategy: str, commands: Commands) -> None:
    command = commands.start("demo", "--strategy", strategy, "--iterations", "2", "--out", "out")
    exit_code, output, errors = command.end()
    assert (exit_code, errors) == (0, "")
    lines = {line.split("  ")[0]: line for line in output.splitlines()}
    assert "22.2 → " in lines["validation return"]
    assert lines["policy versions"].split()[2] == "3,"
    assert (commands.folder / "out" / "cartpole-seed0.png").read_bytes().startswith(b"\x89PNG")
    assert "lightning store --backend sqlite:out/cartpole-seed0-" in lines["what was stored"]


def test_four_processes_work_and_none_is_left_after_ctrl_c(commands: Commands) -> None:
    command = commands.start("demo", "--out", "out")
    command.read_until("iteration  1:")
    parts = command.parts()
    assert len(parts) >= 3  # the server and two runners, beside the algorithm
    command.process.send_signal(signal.SIGINT)
    exit_code, _, errors = command.end()
    assert exit_code == 130
    assert "Traceback" not in errors
    assert all_gone(parts)
    assert not list((commands.folder / "out").glob("*.png"))


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_by_hand_with_the_runners_first_and_a_port_of_the_users(commands: Commands) -> None:
    address = free_address()
    runners = commands.start("runner", "lightning.demo:agent", "--connect", address, "-n", "2")
    assert runners.process.stderr is not None
    assert f"waiting for a store server at {address}" in runners.process.stderr.readline()
    store = commands.start("store", "--backend", "memory", "--port", address.rpartition(":")[2])
    runners.read_until("2 runners of lightning.demo:agent")
    demo = commands.start("demo", "--connect", address, "--iterations", "2", "--out", "out")
    exit_code, output, errors = demo.end()
    assert (exit_code, errors) == (0, "")
    assert f"the store at {address}" in output
    assert runners.end()[0] == 0  # the job has ended, and theirs with it
    store.process.send_signal(signal.SIGINT)
    assert store.end()[0] == 0


async def test_the_episode_of_a_runner_that_is_killed_is_played_again(commands: Commands) -> None:
    address = free_address()
    store = commands.start("store", "--backend", "memory", "--port", address.rpartition(":")[2])
    runners = commands.start("runner", "lightning.demo:agent", "--connect", address, "-n", "2")
    demo = commands.start("demo", "--connect", address, "--iterations", "3", "--out", "out")
    demo.read_until("iteration  1:")
    client = LightningStoreClient(address)
    lost = await kill_while_busy(runners, client)
    exit_code, output, errors = await anyio.to_thread.run_sync(demo.end)
    assert (exit_code, errors) == (0, "")
    assert "retried episodes" in output
    attempts = await client.query_attempts(lost.rollout_id)
    assert [attempt.status for attempt in attempts] == ["unresponsive", "succeeded"]
    assert attempts[0].attempt_id == lost.attempt_id
    await client.close()
    assert runners.end()[0] == 0
    store.process.send_signal(signal.SIGINT)
    assert store.end()[0] == 0


async def kill_while_busy(runners: Command, client: LightningStoreClient) -> Attempt:
    """Kill a runner for sure in the middle of an attempt: stopped first, then looked at. Returns the attempt."""
    (victim,) = runners.parts("runner-0")
    while True:
        victim.suspend()
        workers = [worker for worker in await client.query_workers() if worker.worker_id.endswith("-0")]
        held = workers[0].current_rollout_id
        latest = None if held is None else await client.get_latest_attempt(held)
        if latest is not None and latest.status == "running":
            victim.kill()
            return latest
        victim.resume()
        await anyio.sleep(0.005)


def test_a_folder_that_cannot_be_written(commands: Commands) -> None:
    (commands.folder / "file").touch()
    exit_code, output, errors = commands.start("demo", "--out", "file/out").end()
    assert (exit_code, output) == (1, "")
    assert errors == "error: cannot write to file/out: Not a directory\n"
