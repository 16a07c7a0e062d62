"""Whole jobs over gRPC: the trainer with runner processes, and the three-terminal form through the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from lightning import Algorithm, Trainer, find_final_reward, rollout

DEADLINE_SECONDS = 40.0

CLI = [sys.executable, "-c", "from lightning.cli import main; main()"]

AGENT = """
from helping import factor
from lightning import rollout

@rollout
def agent(task):
    with open("meeting-point", task["mode"]):  # a named pipe: opens when somebody else opens its other end
        return task["value"] * factor
"""


class Rewards(Algorithm):
    """Executes its tasks and keeps their rewards and who executed them."""

    def __init__(self) -> None:
        self.rewards: list[float | None] = []
        self.workers: set[str | None] = set()

    def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        rollouts = [self.run_async(store.enqueue_rollout(input=task)) for task in train_dataset]
        ids = [rollout.rollout_id for rollout in rollouts]
        for ended in self.run_async(store.wait_for_rollouts(rollout_ids=ids)):
            self.rewards.append(find_final_reward(self.run_async(store.query_spans(ended.rollout_id))))
            attempt = self.run_async(store.get_latest_attempt(ended.rollout_id))
            assert attempt is not None
            self.workers.add(attempt.worker_id)


@rollout
def pid(task: float) -> float:
    """An agent that tells its process."""
    return float(os.getpid())


def test_fit_with_runner_processes() -> None:
    algorithm = Rewards()
    Trainer(algorithm=algorithm, n_runners=2, strategy={"type": "cs", "graceful_timeout": 5.0}).fit(
        pid, [1.0] * 8
    )
    assert len(algorithm.rewards) == 8
    assert os.getpid() not in algorithm.rewards
    assert algorithm.workers <= {"runner-0", "runner-1"}


def test_fit_with_an_agent_that_only_this_function_knows() -> None:
    offset = 10.0

    @rollout
    async def closure(task: float) -> float:
        return task + offset

    algorithm = Rewards()
    Trainer(algorithm=algorithm, strategy="cs").fit(closure, [1.0, 2.0])
    assert algorithm.rewards == [11.0, 12.0]


# --- by hand, in several terminals -----------------------------------------------------------------------------------


class Terminal:
    """A command of ours, running, and what it has printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*CLI, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.printed = ""
        self._news = threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def expect(self, pattern: str) -> str:
        """Wait until it has printed something that matches; returns that."""
        with self._news:
            self._news.wait_for(lambda: self._closed or re.search(pattern, self.printed), DEADLINE_SECONDS)
            found = re.search(pattern, self.printed)
        assert found, f"no {pattern!r} in {self.printed!r}"
        return found[0]

    def end(self, number: int) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it and all that could still print has ended."""
        code = self.process.wait(DEADLINE_SECONDS)
        self._reader.join(DEADLINE_SECONDS)
        return code

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def _read(self) -> None:
        with self.process.stdout as lines:  # type: ignore[union-attr]
            for line in lines:
                with self._news:
                    self.printed += line
                    self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()


@pytest.fixture
def terminals(tmp_path: Path) -> Generator[Callable[..., Terminal], None, None]:
    """Opens terminals in a folder that has an agent, and closes them after the test."""
    (tmp_path / "agents.py").write_text(AGENT)
    (tmp_path / "helping.py").write_text("factor = 3.0\n")
    os.mkfifo(tmp_path / "meeting-point")
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.close()


@pytest.fixture
def free_port() -> int:
    """A port that the user chose."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("agent", ["agents.py:agent", "agents:agent"])
def test_runners_started_before_the_store_end_with_the_job(
    terminals: Callable[..., Terminal], free_port: int, agent: str
) -> None:
    address = f"127.0.0.1:{free_port}"
    runner = terminals("runner", agent, "--connect", address, "-n", "2", "--worker-prefix", "mine")
    runner.expect(f"waiting for a store server at {address}")
    store = terminals("store", "--backend", "memory", "--port", str(free_port))
    store.expect(f"store \\(memory\\) at {address}")
    runner.expect(f"2 runners of {agent} at {address}")
    algorithm = Rewards()
    Trainer(algorithm=algorithm, strategy={"type": "cs", "role": "algorithm"}, store=address).fit(
        train_dataset=[{"value": 1.0, "mode": "w"}, {"value": 2.0, "mode": "r"}]
    )
    assert algorithm.rewards == [3.0, 6.0]
    assert algorithm.workers == {"mine-0", "mine-1"}
    assert runner.wait() == 0
    runner.expect("the runners have ended")
    assert store.end(signal.SIGINT) == 0


def test_a_store_ends_on_sigterm_and_frees_its_port(
    terminals: Callable[..., Terminal], free_port: int
) -> None:
    store = terminals("store", "--backend", "memory", "--port", str(free_port))
    store.expect("Ctrl-C ends it")
    assert store.end(signal.SIGTERM) == 0
    store.expect("ending: new calls are refused")
    with socket.create_server(("127.0.0.1", free_port)):
        pass


def test_ctrl_c_ends_runners_that_wait_and_runners_that_work(terminals: Callable[..., Terminal]) -> None:
    store = terminals("store", "--backend", "memory", "--port", "0")
    address = store.expect(r"127\.0\.0\.1:\d+")
    working = terminals("runner", "agents:agent", "--connect", address, "-n", "2")
    working.expect("Ctrl-C ends them")
    assert working.end(signal.SIGINT) == 130
    assert store.end(signal.SIGINT) == 0
    waiting = terminals("runner", "agents:agent", "--connect", address)
    waiting.expect("waiting for a store server")
    assert waiting.end(signal.SIGINT) == 130
    assert "Traceback" not in working.printed + waiting.printed
