"""The command line on real processes, watched line by line, and none left should a test fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

DEADLINE_SECONDS = 50


class Command:
    """`lightning …`, running."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning", *words],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def parts(self, name: str = "") -> list[psutil.Process]:
        """The processes that it started, those whose command line names `name`."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if name in " ".join(child.cmdline())]

    def read_until(self, text: str) -> str:
        """The first line from here on that has `text` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came; {self.end()}")

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, and the rest of what it printed on stdout and stderr."""
        output, errors = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, output, errors


class Commands:
    """Starts commands in a folder of their own, and kills them in the end, with their children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Command] = []

    def start(self, *words: str) -> Command:
        command = Command(*words, cwd=self.folder)
        self._started.append(command)
        return command

    def kill(self) -> None:
        for command in self._started:
            if command.process.poll() is None:
                for process in [*command.parts(), psutil.Process(command.pid)]:
                    process.kill()
            command.process.communicate()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    started = Commands(tmp_path)
    yield started
    started.kill()
