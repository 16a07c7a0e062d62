"""Child processes, one by one: what they get, what they say, and how they end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from lightning.execution import MultiprocessingEvent
from lightning.execution.child import ParentLink
from lightning.execution.job import Job
from lightning.execution.processes import ChildProcess, Payload, describe_exit, stop_children

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20.0


@pytest.fixture
async def job() -> Job:
    job = Job(MultiprocessingEvent(), graceful_timeout=0.2, terminate_timeout=0.2)
    job.urgent = asyncio.Event()
    return job


class Nursery:
    """Starts children, and leaves none."""

    def __init__(self) -> None:
        self.children: list[ChildProcess] = []

    def start(self, entry: object, **environment: str) -> ChildProcess:
        self.children.append(ChildProcess("child", Payload(entry, "the task"), environment))  # type: ignore[arg-type]
        return self.children[-1]


@pytest.fixture
async def nursery() -> AsyncIterator[Nursery]:
    nursery = Nursery()
    yield nursery
    for child in nursery.children:
        child.signal(signal.SIGKILL)
        await asyncio.wait_for(asyncio.shield(child.exited), DEADLINE_SECONDS)


async def _exit_code(child: ChildProcess) -> int:
    return await asyncio.wait_for(asyncio.shield(child.exited), DEADLINE_SECONDS)


async def _report(child: ChildProcess) -> object:
    return await asyncio.wait_for(asyncio.shield(child.reported), DEADLINE_SECONDS)


async def test_a_closure_runs_with_what_it_closes_over(nursery: Nursery) -> None:
    secret = ["not", "importable"]

    async def entry(link: ParentLink) -> None:
        link.report((secret, os.getpid()))

    child = nursery.start(entry)
    assert await _report(child) == (secret, child.pid)
    assert await _exit_code(child) == 0
    assert child.finished


async def test_a_child_sees_the_programs_world(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("/nowhere")
    monkeypatch.setattr(sys, "argv", ["program", "--option"])

    async def entry(link: ParentLink) -> None:
        link.report((sys.path, sys.argv, str(Path.cwd()), os.environ.get("COLOUR"), sys.stdin.read()))

    path, argv, folder, colour, stdin = await _report(nursery.start(entry, COLOUR="blue"))  # type: ignore[misc]
    assert path == sys.path
    assert argv == ["program", "--option"]
    assert folder == str(Path.cwd())
    assert colour == "blue"
    assert stdin == ""


async def test_the_parent_and_a_child_talk(nursery: Nursery) -> None:
    async def entry(link: ParentLink) -> None:
        link.report(await link.receive() + await link.receive())

    child = nursery.start(entry)
    await asyncio.wait_for(asyncio.shield(child.loaded), DEADLINE_SECONDS)
    child.send(40)
    child.send(2)
    assert await _report(child) == 42


async def test_what_multiprocessing_offers_can_be_taken_along(nursery: Nursery) -> None:
    context = multiprocessing.get_context("spawn")
    event, (ours, theirs) = MultiprocessingEvent(), context.Pipe()

    async def entry(link: ParentLink) -> None:
        theirs.send("through the pipe")
        event.set()

    nursery.start(entry)
    assert await asyncio.to_thread(event.wait, DEADLINE_SECONDS)
    assert ours.recv() == "through the pipe"
    ours.close()
    theirs.close()


async def test_a_large_task_arrives(nursery: Nursery) -> None:
    data = os.urandom(20_000_000)

    async def entry(link: ParentLink) -> None:
        link.report(len(data))

    assert await _report(nursery.start(entry)) == len(data)


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    async def entry(link: ParentLink) -> None:
        lock.acquire()

    with pytest.raises(TypeError, match=r"the task cannot be sent to another process: .*lock"):
        Payload(entry, "the task")


async def test_an_exception_comes_back_with_its_traceback(nursery: Nursery) -> None:
    async def entry(link: ParentLink) -> None:
        raise KeyError("in the child")

    child = nursery.start(entry)
    assert await _exit_code(child) == 1
    error = child.error()
    assert isinstance(error, KeyError)
    assert error.args == ("in the child",)
    assert "in entry\n    raise KeyError" in str(error.__cause__)
    assert child.describe_end() == "the child process ended with exit code 1: KeyError: 'in the child'"


async def test_an_exception_that_cannot_be_pickled_comes_back_as_text(nursery: Nursery) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    async def entry(link: ParentLink) -> None:
        raise Odd(1, 2)

    child = nursery.start(entry)
    await _exit_code(child)
    assert str(child.error()).startswith("the child process failed: ")
    assert str(child.error()).endswith("Odd: 1 and 2")


async def test_a_task_that_cannot_be_loaded_is_told_from_one_that_fails(nursery: Nursery) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return int, ("not a number",)

    trap = Trap()

    async def entry(link: ParentLink) -> None:
        link.report(trap)

    child = nursery.start(entry)
    assert await _exit_code(child) == 1
    assert not child.loaded.done()
    assert child.failed is not None
    assert child.failed.loading
    assert isinstance(child.error(), ValueError)


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (lambda: os._exit(0), 0, "the child process ended with exit code 0"),
        (lambda: os._exit(3), 3, "the child process ended with exit code 3"),
        (lambda: sys.exit(4), 4, "the child process ended with exit code 4"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "the child process was killed by SIGKILL"),
    ],
)
async def test_a_death_is_noticed(nursery: Nursery, end: object, code: int, words: str) -> None:
    async def entry(link: ParentLink) -> None:
        end()  # type: ignore[operator]

    child = nursery.start(entry)
    assert await _exit_code(child) == code
    assert not child.finished
    assert child.failed is None
    assert str(child.error()) == words


async def test_what_a_child_started_goes_with_it(nursery: Nursery) -> None:
    event = MultiprocessingEvent()

    async def entry(link: ParentLink) -> None:
        grandchild = subprocess.Popen(["sleep", "1000"])  # noqa: ASYNC220
        link.report(grandchild.pid)
        event.wait(DEADLINE_SECONDS)
        os._exit(5)

    child = nursery.start(entry)
    grandchild = psutil.Process(await _report(child))  # type: ignore[arg-type]
    event.set()
    assert await _exit_code(child) == 5
    _, alive = psutil.wait_procs([grandchild], DEADLINE_SECONDS)
    assert not alive


async def test_threads_left_hanging_do_not_keep_a_finished_child(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def entry(link: ParentLink) -> None:
        from lightning.execution import child as module

        module._EXIT_GRACE_SECONDS = 0.1
        threading.Thread(target=time.sleep, args=(1000,)).start()

    child = nursery.start(entry)
    assert await _exit_code(child) == 0
    assert child.finished


# --- Stopping --------------------------------------------------------------------------------------------------------


def _stubborn(*ignored: int) -> object:
    async def entry(link: ParentLink) -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        link.report("ready")
        await asyncio.get_running_loop().create_future()

    return entry


async def test_sigint_cancels_the_task(nursery: Nursery, tmp_path: Path) -> None:
    async def entry(link: ParentLink) -> None:
        link.report("ready")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            (tmp_path / "cleaned up").touch()

    child = nursery.start(entry)
    await _report(child)
    child.signal(signal.SIGINT)
    assert await _exit_code(child) == 0
    assert (tmp_path / "cleaned up").exists()


async def test_what_ignores_sigint_gets_sigterm(nursery: Nursery, job: Job) -> None:
    child = nursery.start(_stubborn(signal.SIGINT))
    await _report(child)
    await stop_children(job, [child])
    assert child.exited.result() == -signal.SIGTERM
    assert not child.killed


async def test_what_ignores_sigterm_too_is_killed(nursery: Nursery, job: Job) -> None:
    child = nursery.start(_stubborn(signal.SIGINT, signal.SIGTERM))
    await _report(child)
    await stop_children(job, [child])
    assert child.exited.result() == -signal.SIGKILL
    assert child.killed


async def test_all_are_killed_at_once_when_it_is_urgent(nursery: Nursery, job: Job) -> None:
    job.graceful_timeout = job.terminate_timeout = 1000
    children = [nursery.start(_stubborn()) for _ in range(2)]
    for child in children:
        await _report(child)
    stop = asyncio.create_task(stop_children(job, children))
    job.urgent.set()
    await asyncio.wait_for(stop, DEADLINE_SECONDS)
    assert [child.exited.result() for child in children] == [-signal.SIGKILL] * 2


async def test_one_that_ends_when_asked_is_not_disturbed(nursery: Nursery, job: Job) -> None:
    job.graceful_timeout = 1000

    async def entry(link: ParentLink) -> None:
        link.report("ready")
        await link.receive()

    child = nursery.start(entry)
    await _report(child)
    child.send("stop")
    await stop_children(job, [child])
    assert child.exited.result() == 0
    assert child.finished


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (-11, "was killed by SIGSEGV"), (-99, "was killed by signal 99")],
)
async def test_exit_codes_are_explained(code: int, words: str) -> None:
    assert describe_exit(code) == words
