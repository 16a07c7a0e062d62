"""What all tests share: one kind of event loop, no way to skip in CI, and nothing may be left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

import psutil
import pytest

pytest_plugins = ["pytester"]

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

_GRACE_SECONDS = 3.0
"""How long what a test has told to end may take to be gone."""
_PROCESS_WIDE_THREADS = (
    "_poll_wrapper",  # grpc.aio's, one for the life of the process
    "AnyIO worker thread",  # idle ones are kept for the next test
    "Dummy-",  # what Python calls a thread of gRPC's core in which it was asked for something
)


def pytest_configure() -> None:
    """Where tests run as a background job of a shell, SIGINT is ignored, and would be in all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests run on asyncio, which grpc.aio needs."""
    return "asyncio"


# --- Skipping --------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything can be had, a skipped test is a test that is missing."""
    report = yield
    # what tests log of lone surrogates could not be sent from pytest-xdist's workers
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections
    ]
    return _refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for modules that skip themselves as a whole."""
    report = yield
    return _refuse_skip(report)


def _refuse_skip(report: ReportT) -> ReportT:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as a failure in CI: {report.longrepr}"
    return report


# --- Leaks -----------------------------------------------------------------------------------------------------
# Both guards are set up before everything else a test asks for, hence look when all of that is torn down.


@pytest.fixture(autouse=True)
def _leave_no_process_state() -> Iterator[None]:
    """Fails a test that leaves a thread, a child process or a listening port."""
    before = _threads() | _children() | _listeners()
    yield
    leftover = _gone_within_grace(lambda: (_threads() | _children() | _listeners()) - before)
    if leftover:
        pytest.fail(f"the test left behind: {', '.join(sorted(leftover))}")


@pytest.fixture(autouse=True)
def _leave_no_task(request: pytest.FixtureRequest, _leave_no_process_state: None) -> None:
    """Fails a coroutine test that leaves an asyncio task."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("_task_guard")


@pytest.fixture
async def _task_guard(anyio_backend: str) -> AsyncIterator[None]:
    yield
    leftover = {task for task in asyncio.all_tasks() if not _is_test_runner(task)}
    if leftover:
        _, leftover = await asyncio.wait(leftover, timeout=_GRACE_SECONDS)
    if leftover:
        pytest.fail(f"the test left tasks behind: {', '.join(map(repr, leftover))}")


def _is_test_runner(task: asyncio.Task[Any]) -> bool:
    return "TestRunner." in getattr(task.get_coro(), "__qualname__", "")


def _gone_within_grace(look: Callable[[], set[str]]) -> set[str]:
    deadline = time.monotonic() + _GRACE_SECONDS
    while (leftover := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return leftover


def _threads() -> set[str]:
    return {
        f"thread {thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if not any(known in thread.name for known in _PROCESS_WIDE_THREADS)
    }


def _children() -> set[str]:
    if not _has_child():
        return set()
    helpers = {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }
    children = psutil.Process().children(recursive=True)
    return {f"process {child.pid}" for child in children if child.pid not in helpers}


def _has_child() -> bool:
    """Answers at once, where finding out which ones there are means going through all processes of the machine."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _listeners() -> set[str]:
    connections = psutil.Process().net_connections(kind="inet")
    return {
        f"port {connection.laddr.port}"
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }
