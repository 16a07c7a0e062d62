"""Jobs in processes of their own, with this test as the parent: who runs where, and what happens when a part fails."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning import (
    AgentRunner,
    AttemptedRollout,
    ClientServerExecutionStrategy,
    ExecutionEvent,
    InMemoryLightningStore,
    LightningStore,
    LightningStoreClient,
    LightningStoreServer,
    RolloutConfig,
)
from lightning.execution import ExecutionError, RunnerBundle, worker_name

DEADLINE_SECONDS = 20.0
RETRYING = RolloutConfig(max_attempts=3, retry_condition=["unresponsive"])

Handler = Callable[[LightningStore, AttemptedRollout], Awaitable[None]]


# Everything that goes to another process is made in a function, so that it travels by value.


def make_runner(handle: Handler | None = None) -> RunnerBundle:
    """A runner that calls `handle` with what it claims, and reports success and its process."""

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        while not event.is_set():
            for claimed in await store.claim_rollouts(worker_id=worker_name(worker_id), timeout=0.1):
                if handle is not None:
                    await handle(store, claimed)
                await store.update_attempt(
                    claimed.rollout_id,
                    claimed.attempt.attempt_id,
                    status="succeeded",
                    metadata={"pid": os.getpid()},
                )

    return runner


async def have_done(store: LightningStore, tasks: list[Any]) -> list[AttemptedRollout]:
    """Have rollouts done; returns them."""
    ids = [(await store.enqueue_rollout(input=task, config=RETRYING)).rollout_id for task in tasks]
    done = await store.wait_for_rollouts(rollout_ids=ids, timeout=DEADLINE_SECONDS)
    assert len(done) == len(ids), "not all rollouts were done"
    return [rollout for rollout in done if isinstance(rollout, AttemptedRollout)]


class Recorder:
    """An algorithm that has tasks done and keeps what came of them."""

    def __init__(self, *tasks: Any) -> None:
        self.tasks = list(tasks) or ["task"]
        self.done: list[AttemptedRollout] = []
        self.thread: threading.Thread | None = None
        self.store: LightningStore | None = None

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        self.thread, self.store = threading.current_thread(), store
        self.done = await have_done(store, self.tasks)

    @property
    def statuses(self) -> list[str]:
        return [rollout.status for rollout in self.done]

    @property
    def pids(self) -> set[int]:
        return {(rollout.attempt.metadata or {})["pid"] for rollout in self.done}


def strategy(**arguments: Any) -> ClientServerExecutionStrategy:
    """With times that fit a test."""
    return ClientServerExecutionStrategy(**{"graceful_timeout": 5.0, "terminate_timeout": 2.0, **arguments})


def child_processes(name: str) -> list[psutil.Process]:
    """This process's children of that name."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if name in child.cmdline():
                found.append(child)
    return found


async def until(look: Callable[[], object]) -> None:
    """Wait until `look` returns something true; the deadline is the test's."""
    while not look():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


# --- Who runs where --------------------------------------------------------------------------------------------------


def test_runners_work_in_processes_of_their_own() -> None:
    async def wait_for_others(store: LightningStore, claimed: AttemptedRollout) -> None:
        while (await store.query_rollouts(status_in=["queuing"], limit=0)).total:
            pass

    algorithm = Recorder("one", "two")
    strategy(n_runners=2).execute(algorithm, make_runner(wait_for_others))
    assert algorithm.statuses == ["succeeded", "succeeded"]
    assert {rollout.attempt.worker_id for rollout in algorithm.done} == {"runner-0", "runner-1"}
    assert len(algorithm.pids) == 2
    assert os.getpid() not in algorithm.pids
    assert algorithm.thread is threading.main_thread()
    assert isinstance(algorithm.store, LightningStoreClient)


def test_the_runner_can_be_in_this_process() -> None:
    seen: list[tuple[int, threading.Thread]] = []
    pids: list[int] = []

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        seen.append((worker_id, threading.current_thread()))
        await make_runner(look)(store, worker_id, event)

    async def look(store: LightningStore, claimed: AttemptedRollout) -> None:
        pids.append(claimed.input)

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await have_done(store, [os.getpid()])

    strategy(main_process="runner").execute(algorithm, runner)
    assert seen == [(0, threading.main_thread())]
    assert len(pids) == 1
    assert pids[0] != os.getpid()


def test_the_callers_store_object_is_served_and_stays_open(free_port: int) -> None:
    store, algorithm = InMemoryLightningStore(), Recorder()
    strategy(server_port=free_port).execute(algorithm, make_runner(), store)
    assert algorithm.statuses == ["succeeded"]
    assert asyncio.run(count(store, "succeeded")) == 1


async def count(store: LightningStore, status: Any) -> int:
    return (await store.query_rollouts(status_in=[status])).total


def test_a_server_or_client_of_the_callers_is_used_as_it_is(free_port: int) -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=free_port)
    client = LightningStoreClient(f"127.0.0.1:{free_port}")
    try:
        asyncio.run(server.start())
        for store in (server, client):
            algorithm = Recorder()
            strategy().execute(algorithm, make_runner(), store)
            assert algorithm.statuses == ["succeeded"]
            assert algorithm.store is store
            # others may have runners at this store too
            assert algorithm.done[0].attempt.worker_id == f"{socket.gethostname()}-{os.getpid()}-runner-0"
        assert asyncio.run(count(client, "succeeded")) == 2
    finally:
        asyncio.run(client.close())
        asyncio.run(server.close())


def test_roles_apart_meet_at_the_port_and_end_together(free_port: int) -> None:
    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        # told to stop by nobody but the store: the two strategies share no event
        await AgentRunner(store=store, agent=lambda task: 1.0, worker_id=worker_name(worker_id)).run(event)

    apart = strategy(role="runner", server_port=free_port, n_runners=2)
    runners = threading.Thread(target=lambda: apart.execute(Recorder(), runner), daemon=True)
    runners.start()  # first: they wait for the server
    algorithm = Recorder(*range(5))
    strategy(role="algorithm", server_port=free_port).execute(algorithm, make_runner())
    assert algorithm.statuses == ["succeeded"] * 5
    assert {(rollout.attempt.worker_id or "").rpartition("-")[0] for rollout in algorithm.done} == {
        f"{socket.gethostname()}-{os.getpid()}-runner"
    }
    runners.join(DEADLINE_SECONDS)
    assert not runners.is_alive()


def test_runners_without_a_server_give_up_with_the_address(free_port: int) -> None:
    apart = strategy(role="runner", server_port=free_port, connect_timeout=0.5)
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{free_port}"):
        apart.execute(Recorder(), make_runner())


def test_it_works_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""
    algorithm = Recorder()

    async def cell() -> None:
        strategy().execute(algorithm, make_runner())

    asyncio.run(cell())
    assert algorithm.statuses == ["succeeded"]


def test_a_strategy_can_be_used_again(free_port: int) -> None:
    again = strategy(server_port=free_port)
    for _ in range(2):
        algorithm = Recorder()
        again.execute(algorithm, make_runner())
        assert algorithm.statuses == ["succeeded"]


# --- When a part fails -----------------------------------------------------------------------------------------------


def test_what_the_algorithm_raises_is_raised() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        raise KeyError("of the algorithm")

    with pytest.raises(KeyError, match="of the algorithm"):
        strategy().execute(algorithm, make_runner())


def test_what_the_algorithm_raises_in_its_own_process_is_raised_here() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        raise KeyError("of the algorithm")

    with pytest.raises(KeyError, match="of the algorithm") as raised:
        strategy(main_process="runner").execute(algorithm, make_runner())
    assert "in the algorithm process" in str(raised.value.__cause__)
    assert 'raise KeyError("of the algorithm")' in str(raised.value.__cause__)


def test_the_death_of_the_algorithms_process_ends_the_job() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ExecutionError, match="^the algorithm process was killed by SIGKILL$"):
        strategy(main_process="runner").execute(algorithm, make_runner())


def test_what_the_only_runner_raises_in_this_process_is_raised() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await asyncio.get_running_loop().create_future()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        raise ZeroDivisionError("of the runner")

    with pytest.raises(ZeroDivisionError, match="of the runner"):
        strategy(main_process="runner", graceful_timeout=0.2).execute(algorithm, runner)


def die_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_exit() -> None:
    os._exit(0)


def die_by_exception() -> None:
    raise ZeroDivisionError("of the runner")


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (die_by_signal, "the runner-0 process was killed by SIGKILL"),
        (die_by_exit, "the runner-0 process ended with exit code 0"),
        (die_by_exception, "the runner-0 process ended with exit code 1: ZeroDivisionError: of the runner\n"),
    ],
)
def test_a_runner_that_dies_costs_its_attempt_and_not_the_job(
    death: Callable[[], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    deadly = by_value(death)

    async def handle(store: LightningStore, claimed: AttemptedRollout) -> None:
        if claimed.attempt.sequence_id == 1:
            deadly()

    attempts = []

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        (rollout,) = await have_done(store, ["dangerous"])
        attempts.extend(await store.query_attempts(rollout.rollout_id))

    strategy().execute(algorithm, make_runner(handle))
    assert [attempt.status for attempt in attempts] == ["unresponsive", "succeeded"]
    assert [attempt.worker_id for attempt in attempts] == ["runner-0", "runner-0"]
    assert words in caplog.text
    assert "runner-0 is restarted (1 of 3)" in caplog.text


def by_value(function: Callable[[], None]) -> Callable[[], None]:
    """A copy that belongs to no module, so that it is pickled whole: a child cannot import this one."""
    copy = types.FunctionType(function.__code__, {**function.__globals__, "__name__": "__main__"})
    copy.__module__ = "__main__"
    return copy


def test_other_runners_take_over_what_a_dead_one_held() -> None:
    async def handle(store: LightningStore, claimed: AttemptedRollout) -> None:
        if claimed.attempt.sequence_id == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    algorithm = Recorder("dangerous")
    started = time.monotonic()
    strategy(n_runners=2).execute(algorithm, make_runner(handle))
    assert algorithm.statuses == ["succeeded"]
    assert algorithm.done[0].attempt.sequence_id == 2
    assert time.monotonic() - started < DEADLINE_SECONDS


def test_the_job_fails_when_no_runner_is_left(caplog: pytest.LogCaptureFixture) -> None:
    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        raise ZeroDivisionError("of the runner")

    with pytest.raises(
        ExecutionError, match="no runner is left: each of the 2 runners crashed more than 0 times"
    ):
        strategy(n_runners=2, restart_budget=0).execute(Recorder(), runner)
    assert "ZeroDivisionError: of the runner" in caplog.text
    assert "runner-1 is given up after 1 crashes" in caplog.text


def test_the_job_goes_on_with_fewer_runners(caplog: pytest.LogCaptureFixture) -> None:
    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        if worker_id == 0:
            os._exit(3)
        await working(store, worker_id, event)

    working = make_runner()

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await until(lambda: "runner-0 is given up" in caplog.text)
        await have_done(store, ["task"])

    strategy(n_runners=2, restart_budget=0).execute(algorithm, runner)
    assert "runners left: 1" in caplog.text


def test_a_runner_that_cannot_even_be_loaded_ends_the_job_at_once() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return __import__, ("a_module_that_is_not_there",)

    trap = Trap()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        print(trap)  # noqa: T201

    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        strategy().execute(Recorder(), runner)


def test_a_runner_that_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        lock.acquire()

    with pytest.raises(TypeError, match="the runner cannot be sent to another process: .*lock"):
        strategy().execute(Recorder(), runner)


def test_runners_that_come_to_their_own_end_do_not_end_the_job() -> None:
    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        return

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await until(lambda: not child_processes("runner-0") and child_processes("store server"))
        await store.enqueue_rollout(input=1)

    strategy().execute(algorithm, runner)


def test_the_death_of_the_store_server_ends_the_job() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await have_done(store, ["task"])
        child_processes("store server")[0].kill()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(ExecutionError, match="^the store server process was killed by SIGKILL$"):
        strategy().execute(algorithm, make_runner())


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port}"):
            strategy(server_port=port).execute(Recorder(), make_runner())
        with pytest.raises(OSError, match=f"port {port}"):
            strategy(server_port=port).execute(Recorder(), make_runner(), InMemoryLightningStore())


def test_an_unknown_kind_of_store_is_named() -> None:
    with pytest.raises(ValueError, match="unknown store 'cloud:nine'"):
        strategy(store_url="cloud:nine").execute(Recorder(), make_runner())


def test_a_store_that_cannot_leave_this_process_needs_to_be_managed() -> None:
    with pytest.raises(TypeError, match="InMemoryLightningStore cannot be used from other processes"):
        strategy(managed_store=False).execute(Recorder(), make_runner(), InMemoryLightningStore())
    with pytest.raises(ValueError, match="managed_store=False needs a store"):
        strategy(managed_store=False).execute(Recorder(), make_runner())


def test_a_runner_that_hangs_is_killed_in_the_end(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it would end the sleep
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await store.start_rollout(input="never ends", worker_id=worker_name(worker_id))
        hangs.touch()
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter, as a broken extension would

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await until(hangs.exists)

    store = InMemoryLightningStore()
    strategy(graceful_timeout=0.1, terminate_timeout=0.1).execute(algorithm, runner, store)
    assert "runner-0 did not stop when it was told to, and was killed" in caplog.text
    assert asyncio.run(count(store, "failed")) == 1, "what it held should have been given back"


@pytest.mark.parametrize("main_process", ["algorithm", "runner"])
def test_a_bundle_that_sets_the_event_ends_the_job(main_process: str) -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await asyncio.get_running_loop().create_future()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        event.set()

    strategy(main_process=main_process, graceful_timeout=0.2).execute(algorithm, runner)


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LIGHTNING_", "AGL_")):
            monkeypatch.delenv(name)


def test_the_defaults_suit_one_machine() -> None:
    settings = ClientServerExecutionStrategy()
    assert (settings.role, settings.server_host, settings.server_port) == ("both", "127.0.0.1", 0)
    assert (settings.managed_store, settings.n_runners, settings.main_process) == (True, 1, "algorithm")
    assert settings.allowed_exit_codes == {0, -15}
    for role in ("algorithm", "runner"):
        assert ClientServerExecutionStrategy(role=role).server_port == 4747  # type: ignore[arg-type]


def test_the_environment_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_CURRENT_ROLE", "runner")
    monkeypatch.setenv("AGL_SERVER_HOST", "10.0.0.5")
    monkeypatch.setenv("AGL_SERVER_PORT", "4748")
    monkeypatch.setenv("AGL_MANAGED_STORE", "0")
    settings = ClientServerExecutionStrategy()
    assert (settings.role, settings.server_host, settings.server_port) == ("runner", "10.0.0.5", 4748)
    assert settings.managed_store is False
    monkeypatch.setenv("LIGHTNING_ROLE", "algorithm")
    monkeypatch.setenv("LIGHTNING_SERVER_HOST", "127.0.0.2")
    monkeypatch.setenv("LIGHTNING_SERVER_PORT", "4749")
    monkeypatch.setenv("LIGHTNING_MANAGED_STORE", "true")
    settings = ClientServerExecutionStrategy()
    assert (settings.role, settings.server_host, settings.server_port) == ("algorithm", "127.0.0.2", 4749)
    assert settings.managed_store is True
    settings = ClientServerExecutionStrategy("both", "localhost", 4750, managed_store=False)
    assert (settings.role, settings.server_host, settings.server_port) == ("both", "localhost", 4750)
    assert settings.managed_store is False


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("LIGHTNING_ROLE", "both of them", "LIGHTNING_ROLE='both of them' cannot be used as role"),
        ("AGL_SERVER_PORT", "http", "AGL_SERVER_PORT='http' cannot be used as server_port"),
        (
            "LIGHTNING_MANAGED_STORE",
            "maybe",
            "LIGHTNING_MANAGED_STORE='maybe' cannot be used as managed_store",
        ),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=complaint):
        ClientServerExecutionStrategy()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"role": "server"}, "role must be one of algorithm, runner, both, not 'server'"),
        ({"main_process": "store"}, "main_process must be one of algorithm, runner, not 'store'"),
        ({"n_runners": 0}, "n_runners must be at least 1, not 0"),
        ({"n_runners": 2, "main_process": "runner"}, "one runner only, not n_runners=2"),
        ({"server_port": 65536}, "server_port must be from 0 to 65535, not 65536"),
        ({"role": "runner", "server_port": 0}, "server_port=0 means 'pick one'"),
        ({"graceful_timeout": -1}, "graceful_timeout must not be negative"),
        ({"terminate_timeout": float("nan")}, "terminate_timeout must not be negative"),
        ({"restart_budget": -1}, "restart_budget must not be negative"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClientServerExecutionStrategy(**arguments)


def test_a_server_for_other_machines_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="allow_insecure"):
        strategy(server_host="0.0.0.0").execute(Recorder(), make_runner())
