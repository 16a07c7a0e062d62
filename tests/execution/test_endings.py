"""Whole programs and the ways they end: with the right exit code and message, in time, and with nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from lightning.rpc.tokens import add_token

if TYPE_CHECKING:
    from pathlib import Path

    from tests.execution.conftest import Program, ProgramStart

PROGRAM = """
    import asyncio, ctypes, json, multiprocessing, os, signal, subprocess, sys, threading, time

    import lightning
    from lightning.execution import worker_name

    print("main module runs in", os.getpid())
    settings = json.loads(sys.argv[1])
    kind = settings.pop("strategy", "cs")
    behaviour = settings.pop("behaviour", "")
    inside = settings.pop("inside", None)


    class Algorithm:
        async def __call__(self, store, event):
            print("algorithm begins")
            try:
                await self.run(store)
            except asyncio.CancelledError:
                print("algorithm is cancelled")
                raise

        async def run(self, store):
            limit = 1.0 if behaviour == "block" else None
            config = lightning.RolloutConfig(
                max_attempts=2, retry_condition=["unresponsive"], timeout_seconds=limit
            )
            rollout = await store.enqueue_rollout(input=behaviour, config=config)
            if behaviour == "stuck":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it would end the sleep
                print("algorithm is stuck")
                ctypes.CDLL(None).sleep(1000)
            if behaviour == "stubborn":
                await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=0.2)
                print("algorithm blocks")
                time.sleep(1000)
            (done,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id])
            print("rollout", done.status, done.attempt.sequence_id)
            if behaviour == "raise":
                raise KeyError("of the algorithm")


    class Runner:
        async def __call__(self, store, index, event):
            runner = lightning.AgentRunner(store=store, agent=self.work, worker_id=worker_name(index))
            await runner.run(event)
            print("runner ends in order")

        async def work(self, task, rollout):
            first = rollout.attempt.sequence_id == 1
            print("agent begins in", os.getpid())
            if task == "slow" or task == "die" and first:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    print("agent is interrupted")
                    raise
            elif task == "pause":
                await asyncio.sleep(0.5)
            elif task == "long pause":  # longer than a runner waits that is told to stop
                await asyncio.sleep(2.5)
            elif task == "hang":
                libc = ctypes.PyDLL(None)
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                libc.sleep(1000)
            elif task == "block":
                time.sleep(1000)
            elif task == "stubborn":
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(1000)
            elif task == "tool":
                print("tool runs in", subprocess.Popen(["sleep", "1000"]).pid)
                await asyncio.sleep(1000)
            return 1.0


    def execute():
        if kind == "shm":
            strategy = lightning.SharedMemoryExecutionStrategy(**settings)
        else:
            strategy = lightning.ClientServerExecutionStrategy(**settings)
        strategy.execute(Algorithm(), Runner())
        print("done")


    async def cell():
        try:
            execute()
        except KeyboardInterrupt:
            print("the cell is interrupted")


    if __name__ == "__main__":
        if inside == "event loop":
            loop = asyncio.new_event_loop()
            loop.run_until_complete(cell())
            print("the loop goes on", loop.run_until_complete(asyncio.sleep(0, True)))
        elif inside:
            process = multiprocessing.get_context(inside).Process(target=execute)
            process.start()
            process.join()
            sys.exit(process.exitcode)
        else:
            execute()
"""


class Job:
    """The program above, with these settings."""

    def __init__(self, program: ProgramStart, port: int | None = None, **settings: object) -> None:
        self.port = port
        if port is not None:
            settings["server_port"] = port
        self.program: Program = program(PROGRAM, json.dumps(settings))
        self.line, self.process = self.program.line, self.program.process

    def assert_ends(self, *codes: int, within_seconds: float = 10.0) -> None:
        """It ends with one of these exit codes, and with it all of its processes; its port is free."""
        code = self.program.end(within_seconds)
        assert code in codes, self.program.stderr
        self.program.assert_nothing_left()
        if self.port is not None:
            self.program.assert_port_free(self.port)


def test_a_program_whose_classes_are_in_its_main_module(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, n_runners=2)
    assert job.line("main module runs in") == str(job.process.pid)
    assert job.line("agent begins in") != str(job.process.pid)
    assert job.line("rollout") == "succeeded 1"
    assert job.line("done") == ""
    job.assert_ends(0)
    assert "main module" not in "".join(job.program.rest()), "a child ran the main module again"
    assert job.program.stderr == ""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_job_in_a_process_of_multiprocessing(program: ProgramStart, method: str) -> None:
    job = Job(program, inside=method)
    assert job.line("rollout") == "succeeded 1"
    job.assert_ends(0)


def test_the_algorithm_raises(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="raise")
    job.line("rollout")
    job.assert_ends(1)
    assert job.program.stderr.rstrip().endswith("KeyError: 'of the algorithm'")


@pytest.mark.parametrize("layout", [{}, {"main_process": "runner"}, {"strategy": "shm"}])
def test_ctrl_c_ends_everything_in_order(program: ProgramStart, layout: dict[str, object]) -> None:
    job = Job(program, behaviour="slow", **layout)
    job.line("agent begins")
    job.program.signal_group(signal.SIGINT)
    job.assert_ends(-signal.SIGINT)
    said = job.program.rest()
    assert "agent is interrupted" in said
    assert "algorithm is cancelled" in said or layout.get("main_process") == "runner"
    assert "done" not in said
    assert job.program.stderr.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_twice_ends_everything_at_once(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="stubborn", graceful_timeout=1000, terminate_timeout=1000)
    job.line("agent begins")
    job.line("algorithm blocks")
    job.program.signal_group(signal.SIGINT)
    job.program.signal_group(signal.SIGINT)
    # two that come at the same time may be one to the kernel
    until = time.monotonic() + 10.0
    while job.process.poll() is None and time.monotonic() < until:
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    job.assert_ends(-signal.SIGINT)


def test_a_main_thread_that_hangs_does_not_keep_the_program(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="stuck", graceful_timeout=0.3, terminate_timeout=0.3)
    job.line("algorithm is stuck")
    job.process.send_signal(signal.SIGINT)
    job.assert_ends(128 + signal.SIGINT)
    assert "a bundle hangs in the main thread" in job.program.stderr


def test_a_bundle_that_hangs_does_not_keep_a_notebook(program: ProgramStart, free_port: int) -> None:
    """There the bundle has a thread of its own, which can stay behind, so the kernel need not die with it."""
    job = Job(
        program,
        free_port,
        behaviour="stubborn",
        inside="event loop",
        graceful_timeout=0.3,
        terminate_timeout=0.3,
    )
    job.line("algorithm blocks")
    job.process.send_signal(signal.SIGINT)
    job.line("the cell is interrupted")
    job.line("the loop goes on")
    job.assert_ends(0)
    assert "its thread is left behind" in job.program.stderr


def test_sigterm_ends_everything_in_order(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="slow")
    job.line("agent begins")
    job.process.terminate()
    job.line("agent is interrupted")
    job.assert_ends(128 + signal.SIGTERM)
    assert "runner ends in order" in job.program.rest()


def test_an_agent_that_hangs_does_not_keep_the_job(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="hang", graceful_timeout=0.3, terminate_timeout=0.3)
    job.line("agent begins")
    job.program.signal_group(signal.SIGINT)
    job.assert_ends(-signal.SIGINT)


@pytest.mark.parametrize("main_process", ["algorithm", "runner"])
def test_an_agent_that_blocks_does_not_spoil_the_end(program: ProgramStart, main_process: str) -> None:
    job = Job(
        program, behaviour="block", main_process=main_process, graceful_timeout=0.3, terminate_timeout=0.3
    )
    assert job.line("rollout") == "failed 1"
    assert job.line("done") == ""
    job.assert_ends(0)


@pytest.mark.parametrize("behaviour", ["slow", "hang"])
@pytest.mark.parametrize("main_process", ["algorithm", "runner"])
def test_the_parent_is_killed(
    program: ProgramStart, free_port: int, main_process: str, behaviour: str
) -> None:
    job = Job(program, free_port, behaviour=behaviour, main_process=main_process)
    job.line("agent begins")
    assert len(job.program.relatives()) >= 3
    job.process.kill()
    job.assert_ends(-signal.SIGKILL)


def test_a_runner_is_killed(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="die", n_runners=2)
    victim = int(job.line("agent begins in"))
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    job.line("agent begins in")
    assert time.monotonic() - killed < 2.0, "the other runner should have had it at once"
    assert job.line("rollout") == "succeeded 2"
    job.assert_ends(0)
    assert "process was killed by SIGKILL" in job.program.stderr


def test_the_store_server_is_killed(program: ProgramStart, free_port: int) -> None:
    job = Job(program, free_port, behaviour="slow")
    job.line("agent begins")
    job.program.child("store server").kill()
    job.assert_ends(1)
    assert job.program.stderr.rstrip().endswith("the store server process was killed by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_an_agent_started_goes_with_it(program: ProgramStart, number: int) -> None:
    job = Job(program, behaviour="tool")
    tool = psutil.Process(int(job.line("tool runs in")))
    job.process.send_signal(number)
    job.assert_ends(128 + signal.SIGTERM, -signal.SIGKILL)
    psutil.wait_procs([tool], 5.0)
    assert not tool.is_running()


# --- Roles apart -----------------------------------------------------------------------------------------------------


def apart(program: ProgramStart, port: int, behaviour: str = "pause", n_runners: int = 2) -> tuple[Job, Job]:
    runners = Job(program, port, role="runner", n_runners=n_runners)
    algorithm = Job(program, port, role="algorithm", behaviour=behaviour)
    runners.port = None  # not its to free
    runners.line("agent begins")
    return algorithm, runners


def test_runners_end_when_the_algorithm_does(program: ProgramStart, free_port: int) -> None:
    algorithm, runners = apart(program, free_port)
    assert algorithm.line("rollout") == "succeeded 1"
    algorithm.assert_ends(0)
    runners.assert_ends(0)


def test_runners_end_when_the_algorithm_is_interrupted(program: ProgramStart, free_port: int) -> None:
    algorithm, runners = apart(program, free_port, "slow")
    algorithm.process.send_signal(signal.SIGINT)
    algorithm.assert_ends(-signal.SIGINT)
    runners.assert_ends(0)


def test_runners_finish_what_they_do_when_they_are_terminated(program: ProgramStart, free_port: int) -> None:
    algorithm, runners = apart(program, free_port, "long pause")
    runners.process.terminate()
    assert algorithm.line("rollout") == "succeeded 1"
    runners.assert_ends(128 + signal.SIGTERM)
    algorithm.assert_ends(0)


def test_runners_are_interrupted_by_ctrl_c_and_their_work_is_done_by_others(
    program: ProgramStart, free_port: int
) -> None:
    algorithm, runners = apart(program, free_port, "die", n_runners=1)
    runners.program.signal_group(signal.SIGINT)
    runners.line("agent is interrupted")
    runners.assert_ends(-signal.SIGINT)
    others = Job(program, None, role="runner", server_port=free_port)
    assert algorithm.line("rollout") == "succeeded 2"
    algorithm.assert_ends(0)
    others.assert_ends(0)


def test_the_parent_of_runners_is_killed(program: ProgramStart, free_port: int) -> None:
    algorithm, runners = apart(program, free_port, "slow")
    runners.process.kill()
    runners.assert_ends(-signal.SIGKILL)
    algorithm.process.terminate()
    algorithm.assert_ends(128 + signal.SIGTERM)


IDLE_SERVER = """
    import asyncio, sys

    import lightning


    async def main():
        server = lightning.LightningStoreServer(lightning.InMemoryLightningStore(), port=int(sys.argv[1]))
        await server.start()
        while not await server.query_workers():
            await asyncio.sleep(0.02)
        print("a runner is there")
        await asyncio.Event().wait()


    asyncio.run(main())
"""


def test_runners_drain_with_a_token_that_may_only_work(
    program: ProgramStart, free_port: int, tmp_path: Path
) -> None:
    """They are told by their parent, not through the store, where only an algorithm may command workers."""
    tokens = tmp_path / "tokens.json"
    token, _ = add_token(tokens, "runner", None, None)
    algorithm = Job(
        program, free_port, role="algorithm", behaviour="long pause", server_options={"tokens": str(tokens)}
    )
    runners = Job(
        program,
        None,
        role="runner",
        server_port=free_port,
        client_options={"token": token},
        graceful_timeout=1000,  # nothing but being told ends them
    )
    runners.line("agent begins")
    runners.process.terminate()
    assert algorithm.line("rollout") == "succeeded 1"
    runners.assert_ends(128 + signal.SIGTERM)
    algorithm.assert_ends(0)
    assert "may not" not in runners.program.stderr


def test_runners_drain_while_the_server_is_away(program: ProgramStart, free_port: int) -> None:
    server = program(IDLE_SERVER, str(free_port))
    runners = Job(program, None, role="runner", server_port=free_port, graceful_timeout=1000)
    server.line("a runner is there")
    server.process.kill()
    server.process.wait()
    runners.process.terminate()
    runners.assert_ends(128 + signal.SIGTERM)
    assert "runner ends in order" in runners.program.rest()
