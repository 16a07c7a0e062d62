#!/usr/bin/env python3
"""Ends jobs in every way there is, on real processes, and looks at what is left of them.

    .venv/bin/python scripts/prove_endings.py                        every layout, every ending
    .venv/bin/python scripts/prove_endings.py --only apart kill      those whose names have both words in them

The layouts are threads ("shm"), processes ("cs"), those with the runner in the main process, and the roles in programs
of their own; then processes once more, where the program is run by `python -m`, its bundles are closures, it executes
the job in a process of multiprocessing (spawn and forkserver), or is a cell in a real Jupyter kernel.

For each cell: the exit codes and what is said on stderr; every process of the job gone within the limit; the port
free; no temporary file; the store's file sound, with the rollout in it as the algorithm last saw it. Prints the matrix
with the seconds from the event to the end of the last process; the exit status is 1 if a cell is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning import SQLiteLightningStore

ENDINGS_FOLDER = Path(__file__).resolve().parent / "endings"
MARK = "LIGHTNING_PROOF_MARK"
BEGIN_LIMIT_SECONDS = 60.0
END_LIMIT_SECONDS = 30.0
"""How long a job may take to be gone: its timeouts, which are 2 s each, and what a busy machine adds."""
FORBEARANCE_SECONDS = 2.0

FORMS = {
    "script": (str(ENDINGS_FOLDER / "program.py"),),
    "module": ("-m", "endings.program"),
    "closure": (str(ENDINGS_FOLDER / "program.py"),),
    "spawn": (str(ENDINGS_FOLDER / "program.py"),),
    "forkserver": (str(ENDINGS_FOLDER / "program.py"),),
    "notebook": (str(ENDINGS_FOLDER / "kernel.py"), str(ENDINGS_FOLDER / "program.py")),
}
"""How the program is started; it knows itself how to be the others."""

LAYOUTS: dict[str, list[dict[str, object]]] = {
    "shm": [{"kind": "shm"}],
    "cs": [{"kind": "cs"}],
    "cs, runner in main": [{"kind": "cs", "main_process": "runner"}],
    "roles apart": [{"kind": "cs", "role": "algorithm"}, {"kind": "cs", "role": "runner"}],
    **{form: [{"kind": "cs", "form": form}] for form in FORMS if form != "script"},
}
"""The programs of a job. Those after the first four are "cs" once more, in other forms."""


class CellError(Exception):
    """What is not as it should be."""


class Program:
    """One program of a job, in a session of its own, as if started from a terminal."""

    def __init__(self, folder: Path, name: str, mark: str, settings: dict[str, object]) -> None:
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        (folder / "temp").mkdir(exist_ok=True)
        environment = {MARK: mark, "TMPDIR": str(folder / "temp"), "PYTHONPATH": str(ENDINGS_FOLDER.parent)}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *FORMS[str(settings["form"])], json.dumps(settings)],
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def job_pid(self) -> int:
        """The process in which the job is executed: that of the program, mostly."""
        return int(self.wait_to_say("executes in"))

    def said(self, start: str) -> str | None:
        """The rest of the first line that begins so."""
        for line in self._out.read_text().splitlines():
            if line.startswith(start):
                return line.removeprefix(start).strip()
        return None

    def wait_to_say(self, start: str) -> str:
        until(lambda: self.said(start) is not None or self.process.poll() is not None, f"to say {start!r}")
        said = self.said(start)
        if said is None:
            raise CellError(f"ended before it said {start!r}: {self.stderr[-400:]}")
        return said


@dataclass
class Run:
    """A job under way."""

    folder: Path
    layout: str
    behaviour: str
    port: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    programs: list[Program] = field(default_factory=list)

    def start(self) -> None:
        for number, layout in enumerate(LAYOUTS[self.layout]):
            settings: dict[str, object] = {
                "form": "script",
                **layout,
                "behaviour": self.behaviour,
                "store_path": str(self.folder / "store.db"),
            }
            if layout["kind"] == "cs":
                settings |= {"server_port": self.port, "graceful_timeout": 2.0, "terminate_timeout": 2.0}
                settings |= {"restart_budget": 1}
            else:
                settings |= {"graceful_delay": 2.0, "join_timeout": 2.0}
            self.programs.append(Program(self.folder, f"program-{number}", self.mark, settings))

    @property
    def first(self) -> Program:
        """The algorithm's program, or the only one."""
        return self.programs[0]

    @property
    def last(self) -> Program:
        """The runners' program, or the only one."""
        return self.programs[-1]

    def relatives(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def close(self) -> None:
        for process in self.relatives():
            process.kill()
        for program in self.programs:
            program.process.wait()


def until(look: Callable[[], object], what: str, seconds: float = BEGIN_LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            raise CellError(f"did not come {what} within {seconds:.0f} s")
        time.sleep(0.05)


# --- What ends a job -------------------------------------------------------------------------------------------------


def nothing(run: Run) -> None:
    """It ends by itself."""


def ctrl_c(run: Run) -> None:
    os.killpg(run.first.process.pid, signal.SIGINT)


def ctrl_c_twice(run: Run) -> None:
    deadline = time.monotonic() + END_LIMIT_SECONDS
    while run.first.process.poll() is None and time.monotonic() < deadline:
        ctrl_c(run)
        time.sleep(0.3)


def sigterm(run: Run) -> None:
    os.kill(run.first.job_pid, signal.SIGTERM)


def kill_parent(run: Run) -> None:
    os.kill(run.last.job_pid, signal.SIGKILL)


def kill_runner(run: Run) -> None:
    os.kill(int(run.last.wait_to_say("agent begins in")), signal.SIGKILL)


def kill_server(run: Run) -> None:
    for process in run.relatives():
        if "store server" in process.cmdline():
            process.kill()
            return
    raise CellError("has no server process")


INTERRUPTED = (-signal.SIGINT,)
TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)
KILLED = (128 + signal.SIGKILL, -signal.SIGKILL)


@dataclass(frozen=True)
class Ending:
    """A row of the matrix."""

    behaviour: str
    act: Callable[[Run], None]
    codes: tuple[int, ...]
    """Of the first program."""
    apart: tuple[int, ...] = (0,)
    """Of the runners' program, where it is another."""
    words: str = ""
    """Must be in what is said on stderr, of either."""
    begins: str = "agent begins in"
    """What the program with the runner, or the algorithm, says when it is time to act."""
    only_in: tuple[str, ...] = tuple(LAYOUTS)
    other_words: tuple[tuple[str, str], ...] = ()
    """By layout, in place of `words`."""
    terminate_rest: bool = False
    """Roles apart: what is left waits for others to come, rightly, and has to be told to end."""
    leaves: tuple[str, ...] = ()
    """The statuses that the rollout may have in the store in the end; empty: any."""

    @property
    def at_first(self) -> bool:
        """Whether it strikes the algorithm's program, and what is left are the runners."""
        return self.act in (kill_server, ctrl_c_twice)


PROCESSES = tuple(layout for layout in LAYOUTS if layout != "shm")
OWN_RUNNERS = tuple(layout for layout in PROCESSES if layout != "cs, runner in main")
ENDINGS = {
    "normal end": Ending("", nothing, (0,), leaves=("succeeded",)),
    "algorithm raises": Ending("algorithm raises", nothing, (1,), words="KeyError: 'of the algorithm'"),
    "runner raises": Ending(
        "runner raises", nothing, (1,), (1,), "no runner is left", "enqueued",
        other_words=(("shm", "RuntimeError: of the runner"), ("cs, runner in main", "RuntimeError: of the runner")),
        terminate_rest=True,
    ),
    "agent raises": Ending("agent raises", nothing, (0,), leaves=("failed",)),
    "agent hangs in a C call": Ending("agent hangs", nothing, (0,), leaves=("failed",)),
    "Ctrl-C once": Ending("waits", ctrl_c, INTERRUPTED, words="KeyboardInterrupt"),
    "Ctrl-C twice": Ending(
        "stubborn", ctrl_c_twice, INTERRUPTED, (0, *TERMINATED), begins="algorithm blocks", terminate_rest=True
    ),
    "SIGTERM": Ending("waits", sigterm, TERMINATED),
    "kill -9 of the parent": Ending("waits", kill_parent, KILLED, KILLED, terminate_rest=True),
    "kill -9 of a runner": Ending(
        "dies", kill_runner, (0,), words="was killed by SIGKILL", only_in=OWN_RUNNERS, leaves=("succeeded",)
    ),
    "kill -9 of the server": Ending(
        "waits", kill_server, (1,), TERMINATED, "the store server process was killed by SIGKILL",
        only_in=PROCESSES, terminate_rest=True,
    ),
}  # fmt: skip


# --- One cell --------------------------------------------------------------------------------------------------------


def prove(layout: str, ending: Ending) -> float:
    """Run one cell; returns the seconds it took to end. Raises `CellError`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), layout, ending.behaviour, port)
        run.start()
        try:
            return _prove(run, ending)
        finally:
            run.close()


def _prove(run: Run, ending: Ending) -> float:
    speaker = run.last if ending.begins.startswith("agent") else run.first
    run.first.wait_to_say("enqueued")
    speaker.wait_to_say(ending.begins)
    acted = time.monotonic()
    ending.act(run)
    if ending.terminate_rest and len(run.programs) > 1:
        _terminate_rest(run, ending)
    until(lambda: not any(run.relatives()), "to an end with all its processes", END_LIMIT_SECONDS)
    took = time.monotonic() - acted
    _check_said(run, ending)
    _check_left(run, ending)
    return took


def _terminate_rest(run: Run, ending: Ending) -> None:
    """End the program that is not concerned, once the other has ended."""
    concerned, rest = (run.first, run.last) if ending.at_first else (run.last, run.first)
    until(lambda: concerned.process.poll() is not None, "to an end", END_LIMIT_SECONDS)
    time.sleep(FORBEARANCE_SECONDS)
    code = rest.process.poll()
    if code == 0 and ending.act is ctrl_c_twice:  # there was time to tell it
        return
    if code is not None:
        raise CellError(f"the other program ended too, with {code}: {rest.stderr[-400:]}")
    rest.process.terminate()


def _check_said(run: Run, ending: Ending) -> None:
    expected = [ending.codes]
    if len(run.programs) > 1:
        expected.append(ending.apart)
        if ending.terminate_rest and not ending.at_first:
            expected[0] = TERMINATED
    stderr = "\n".join(program.stderr for program in run.programs)
    for program, codes in zip(run.programs, expected, strict=True):
        code = program.process.wait(END_LIMIT_SECONDS)
        if code not in codes:
            raise CellError(f"exit code {code}, not {' or '.join(map(str, codes))}: {stderr[-600:]}")
    words = dict(ending.other_words).get(run.layout, ending.words)
    if words not in stderr:
        raise CellError(f"{words!r} is not said: {stderr[-600:]}")


def _check_left(run: Run, ending: Ending) -> None:
    # multiprocessing leaves a folder of its own where the process with its fork server is interrupted while it ends
    left = [path.name for path in (run.folder / "temp").iterdir() if not path.name.startswith("pymp-")]
    if left:
        raise CellError(f"temporary files are left: {left}")
    with socket.create_server(("127.0.0.1", run.port)):
        pass
    with sqlite3.connect(run.folder / "store.db") as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        raise CellError(f"the store's file is not sound: {verdict}")
    status = asyncio.run(_stored_status(run))
    seen = run.first.said("rollout")
    if (seen and status != seen) or (ending.leaves and status not in ending.leaves):
        raise CellError(f"the rollout is stored as {status}, was seen as {seen}")


async def _stored_status(run: Run) -> str:
    store = SQLiteLightningStore(str(run.folder / "store.db"))
    try:
        rollout = await store.get_rollout_by_id(run.first.wait_to_say("enqueued"))
    finally:
        await store.close()
    if rollout is None:
        raise CellError("the rollout is not in the store any more")
    return str(rollout.status)


# --- All of them -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--at-once", type=int, default=2, help="how many cells to run at a time")
    options = parser.parse_args()
    # a shell lets what it runs in the background ignore Ctrl-C, and so would the programs here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cells = [
        (name, layout)
        for name, ending in ENDINGS.items()
        for layout in ending.only_in
        if all(word in f"{layout} {name}" for word in options.only)
    ]
    if not cells:
        parser.error("no cell has these words in its name")
    console, results = Console(width=160), {}

    def cell(key: tuple[str, str]) -> None:
        name, layout = key
        try:
            results[key] = f"ok {prove(layout, ENDINGS[name]):.1f} s"
        except CellError as error:
            results[key] = "FAILED"
            console.print(f"{layout}, {name}: {error}", style="red", markup=False)

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=console) as progress, ThreadPoolExecutor(options.at_once) as pool:
        task = progress.add_task("cells", total=len(cells))
        for _ in pool.map(cell, cells):
            progress.advance(task)
    columns = [layout for layout in LAYOUTS if any(layout == each for _, each in cells)]
    table = Table("ending", *columns)
    for name in dict.fromkeys(name for name, _ in cells):
        table.add_row(name, *(results.get((name, layout), "–") for layout in columns))
    console.print(table)
    return int("FAILED" in results.values())


if __name__ == "__main__":
    sys.exit(main())
