"""The command `lightning demo` on real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "lightning", "demo"]
DEADLINE_SECONDS = 50


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that are killed, with their children, should the test fail."""
    commands: list[subprocess.Popen[str]] = []
    yield commands
    for command in commands:
        if command.poll() is None:
            for process in [
                *psutil.Process(command.pid).children(recursive=True),
                psutil.Process(command.pid),
            ]:
                process.kill()
        command.communicate()


def start(commands: list[subprocess.Popen[str]], *words: str, cwd: Path) -> subprocess.Popen[str]:
    command = subprocess.Popen(
        [*COMMAND, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    commands.append(command)
    return command


def read_until(command: subprocess.Popen[str], text: str) -> None:
    assert command.stdout is not None
    for line in command.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


@pytest.mark.parametrize("strategy", ["cs", "shm"])
def test_it_trains_and_says_what_came_of_it(
    strategy: str, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    command = start(started, "--strategy", strategy, "--iterations", "2", "--out", "out", cwd=tmp_path)
    output, errors = command.communicate(timeout=DEADLINE_SECONDS)
    assert (command.returncode, errors) == (0, "")
    lines = {line.split("  ")[0]: line for line in output.splitlines()}
    assert "22.2 → " in lines["validation return"]
    assert lines["policy versions"].split()[2] == "3,"
    assert (tmp_path / "out" / "cartpole-seed0.png").read_bytes().startswith(b"\x89PNG")
    assert "lightning store --backend sqlite:out/cartpole-seed0-" in lines["what was stored"]


def test_four_processes_work_and_none_is_left_after_ctrl_c(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    command = start(started, "--out", "out", cwd=tmp_path)
    read_until(command, "iteration  1:")
    parts = psutil.Process(command.pid).children(recursive=True)
    assert len(parts) >= 3  # the server and two runners, beside the algorithm
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=DEADLINE_SECONDS)
    assert command.returncode == 130
    assert "Traceback" not in errors
    assert not [part for part in parts if part.is_running() and part.status() != psutil.STATUS_ZOMBIE]
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    (tmp_path / "file").touch()
    command = start(started, "--out", "file/out", cwd=tmp_path)
    output, errors = command.communicate(timeout=DEADLINE_SECONDS)
    assert (command.returncode, output) == (1, "")
    assert errors == "error: cannot write to file/out: Not a directory\n"
