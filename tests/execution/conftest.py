"""Programs run for real: started from a file, watched line by line, and checked for what they leave behind."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

DEADLINE_SECONDS = 20.0
"""How long anything may take that a test waits for; passes long before, unless it is broken."""
_MARK = "LIGHTNING_TEST_MARK"


def eventually(look: Callable[[], object], what: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until `look` returns something true."""
    until = time.monotonic() + deadline_seconds
    while not look():
        if time.monotonic() > until:
            pytest.fail(f"did not happen within {deadline_seconds} s: {what}")
        time.sleep(0.02)


class Program:
    """A program in a session of its own, as if started from a terminal."""

    def __init__(self, folder: Path, source: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._mark = uuid.uuid4().hex
        # short, for a socket's path in it may have no more than some hundred bytes
        self.temp = Path(tempfile.mkdtemp(prefix="lightning-"))
        script = folder / "program.py"
        script.write_text(textwrap.dedent(source))
        # what its children print comes at once, too: they do not inherit -u
        env = {"PYTHONUNBUFFERED": "1", **(env or {})}
        self._stderr = (folder / "stderr.txt").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=folder,
            env={**os.environ, **env, _MARK: self._mark, "TMPDIR": str(self.temp)},
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode().strip())
        self._lines.put(None)

    @property
    def stderr(self) -> str:
        return Path(self._stderr.name).read_text()

    def line(self, start: str) -> str:
        """The rest of the first line of output that starts like this and was not returned before."""
        for line in self._seen:
            if line.startswith(start):
                self._seen.remove(line)
                return line.removeprefix(start).strip()
        until = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                pytest.fail(f"the program did not print {start!r}; it says:\n{self.stderr}")
            if line is None:
                pytest.fail(f"the program ended before it printed {start!r}; it says:\n{self.stderr}")
            if line.startswith(start):
                return line.removeprefix(start).strip()
            self._seen.append(line)

    def rest(self) -> list[str]:
        """What it printed besides, once it has ended."""
        while (line := self._lines.get(timeout=DEADLINE_SECONDS)) is not None:
            self._seen.append(line)
        return self._seen

    def signal_group(self, number: int) -> None:
        """As a terminal does: to every process of the program's group."""
        os.killpg(self.process.pid, number)

    def relatives(self) -> list[psutil.Process]:
        """All processes that come of the program and still run, wherever they hang in the process tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def child(self, name: str) -> psutil.Process:
        """The process of this name, once it is there."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in self.relatives():
                try:
                    if name in process.cmdline():
                        found.append(process)
                except psutil.Error:
                    continue
            return bool(found)

        eventually(look, f"a process called {name}")
        return found[0]

    def end(self, deadline_seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for its end; returns the exit code."""
        try:
            return self.process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            printed = [*self._seen, *filter(None, list(self._lines.queue))]
            pytest.fail(f"the program does not end; it printed {printed} and says:\n{self.stderr}")

    def assert_nothing_left(self) -> None:
        """No process, no temporary file."""
        eventually(lambda: not self.relatives(), "every process of the program is gone", 5.0)
        assert list(self.temp.iterdir()) == []

    def assert_port_free(self, port: int) -> None:
        """Nobody listens there any more."""

        def look() -> bool:
            try:
                socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                return False
            return True

        # a killed process lets go of its sockets with the last of its threads, a moment after it is gone
        eventually(look, f"port {port} is free")

    def close(self) -> None:
        for process in self.relatives():
            process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()
        shutil.rmtree(self.temp)


ProgramStart = Callable[..., Program]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[ProgramStart]:
    """Starts programs: `program(source, *arguments, env=None)`."""
    running: list[Program] = []

    def start(source: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        running.append(Program(folder, source, *arguments, env=env))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
