"""Other processes: forked, spawned, killed, and those that just end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 40


def run_script(path: Path, body: str, *arguments: str, expect: int = 0) -> str:
    """Run a Python script in a process of its own; returns what it printed."""
    script = path / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception" not in done.stderr, done.stderr
    return done.stdout


PREAMBLE = """
import asyncio, multiprocessing, os, sys, threading
from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.testing import make_span

def wait_for_child(pid):
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
"""


def test_a_forked_child_of_a_serving_process_is_a_client(tmp_path: Path) -> None:
    """gRPC is alive in the parent, with a server and a client in use, and is so again after the child has ended."""
    out = run_script(
        tmp_path,
        """
        async def child(server, client):
            assert (await server.dequeue_rollout("w")).input == "first"
            (claimed,) = await client.claim_rollouts(worker_id="w", timeout=10)
            assert claimed.input == "second"
            try:
                await client.get_latest_attempt("ro-nobody")
            except ValueError as error:
                assert "ro-nobody" in str(error)
            else:
                raise AssertionError("no error")
            assert await client.deliver_spans([make_span(claimed, name="from the child")]) == 1
            big = "x" * 3_000_000
            await asyncio.gather(*[client.enqueue_rollout(big) for _ in range(4)])
            assert (await server.query_rollouts()).total == 7
            assert await client.receive_commands("w", timeout=0) == []
            pending = asyncio.ensure_future(client.receive_commands("w"))
            await client.update_rollout(claimed.rollout_id, status="cancelled")
            assert [command.kind for command in await pending] == ["cancel_attempt"]
            await client.close()
            await server.close()
            try:
                await client.statistics()
            except RuntimeError as error:
                assert "closed" in str(error)
            else:
                raise AssertionError("it is closed")

        async def main():
            server = LightningStoreServer(InMemoryLightningStore(), port=0)
            await server.start()
            client = LightningStoreClient(server.endpoint)
            await client.enqueue_rollout("first")
            await client.enqueue_rollout("second")
            streaming = await client.start_rollout("streams")
            assert await client.deliver_spans([make_span(streaming, name="from the parent")]) == 1
            await client.update_rollout(streaming.rollout_id, status="cancelled")
            return server, client

        loop = asyncio.new_event_loop()
        server, client = loop.run_until_complete(main())
        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(child(server, client))
                os._exit(0)
            finally:
                sys.stderr.flush()
                os._exit(1)
        wait_for_child(pid)

        async def after():
            statistics = await client.statistics()
            print(statistics["total_rollouts"], statistics["total_spans"], len(threading.enumerate()))
            await client.close()
            await server.close()

        loop.run_until_complete(after())
        loop.close()
        """,
    )
    assert out.split()[:2] == ["7", "2"]


async def test_a_child_forked_after_grpc_was_used_is_a_client(tmp_path: Path) -> None:
    """Nothing of gRPC is in use any more, but its core has had threads, which do not come along."""
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    try:
        out = await asyncio.to_thread(
            run_script,
            tmp_path,
            """
            async def ask():
                client = LightningStoreClient(sys.argv[1])
                rollout = await client.enqueue_rollout("task")
                async for event in client.watch_rollouts(rollout_ids=[rollout.rollout_id]):
                    print(event.rollout.status, flush=True)
                    await client.update_rollout(rollout.rollout_id, status="cancelled")
                await client.close()

            asyncio.run(ask())
            pid = os.fork()
            if pid == 0:
                try:
                    asyncio.run(ask())
                    os._exit(0)
                finally:
                    os._exit(1)
            wait_for_child(pid)
            asyncio.run(ask())
            """,
            server.endpoint,
        )
        assert out.split() == ["queuing", "cancelled"] * 3
        assert (await server.query_rollouts()).total == 3
    finally:
        await server.close()


def test_a_child_forked_before_grpc_was_used_speaks_it_itself(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        """
        async def serve(ready):
            server = LightningStoreServer(InMemoryLightningStore(), port=0)
            await server.start()
            os.write(ready, server.endpoint.encode())
            await server.run_forever()

        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            asyncio.run(serve(w))
            os._exit(0)

        async def main():
            client = LightningStoreClient(os.read(r, 100).decode())
            await client.enqueue_rollout(1)
            print((await client.statistics())["total_rollouts"])
            await client.close()

        asyncio.run(main())
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        """,
    )
    assert out.split() == ["1"]


def test_the_relay_of_a_forked_child_ends_with_it(tmp_path: Path) -> None:
    """Even if the child is killed."""
    run_script(
        tmp_path,
        """
        import psutil, time

        async def main():
            server = LightningStoreServer(InMemoryLightningStore(), port=0)
            await server.start()
            return server

        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(main())
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            async def child():
                await server.statistics()
                os.write(w, b"x")
                await asyncio.Event().wait()
            asyncio.run(child())
        os.read(r, 1)
        (relay,) = psutil.Process(pid).children()
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        relay.wait(10)
        loop.run_until_complete(server.close())
        loop.close()
        """,
    )


def enqueue_from_elsewhere(store: Any, name: str) -> None:
    """The body of a child process that was given a store."""

    async def main() -> None:
        await store.enqueue_rollout(name)
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_a_server_and_a_client_can_be_given_to_a_process(
    server: LightningStoreServer, client: LightningStoreClient, method: str
) -> None:
    context = multiprocessing.get_context(method)
    children = [
        context.Process(target=enqueue_from_elsewhere, args=(server, "by the server")),
        context.Process(target=enqueue_from_elsewhere, args=(client, "by the client")),
    ]
    for child in children:
        child.start()
    for child in children:
        await asyncio.to_thread(child.join, DEADLINE_SECONDS)
        assert child.exitcode == 0
    assert {r.input for r in await server.query_rollouts()} == {"by the server", "by the client"}


def test_an_interpreter_ends_with_everything_open(tmp_path: Path) -> None:
    """A server, clients, long polls and streams that nobody closed do not keep a process from ending, quietly."""
    out = run_script(
        tmp_path,
        """
        async def main():
            server = LightningStoreServer(InMemoryLightningStore(), port=0)
            await server.start()
            client = LightningStoreClient(server.endpoint)
            await client.statistics()
            assert await client.receive_commands("w", timeout=0) == []
            for call in (client.claim_rollouts(), client.receive_commands("w", instance_id="i")):
                kept.append(asyncio.ensure_future(call))
            await client.statistics()
            streaming = await client.start_rollout("streams")
            assert await client.deliver_spans([make_span(streaming)]) == 1
            kept.extend((server, client))

        kept = []
        asyncio.run(main())
        print("end")
        """,
    )
    assert out.split() == ["end"]


def test_an_interpreter_ends_with_an_open_stream_of_spans(tmp_path: Path) -> None:
    process, address = start_server(tmp_path)
    try:
        out = run_script(
            tmp_path,
            """
            async def main():
                client = LightningStoreClient(sys.argv[1])
                rollout = await client.start_rollout("streams")
                assert await client.deliver_spans([make_span(rollout)]) == 1
                kept.append(asyncio.ensure_future(client.deliver_spans([make_span(rollout)])))
                kept.append(client)

            kept = []
            asyncio.run(main())
            print("end")
            """,
            address,
        )
    finally:
        process.kill()
        process.communicate()
    assert out.split() == ["end"]


def test_an_interpreter_ends_while_the_server_is_away(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        """
        async def main():
            client = LightningStoreClient("127.0.0.1:9", retry_delays=(60,))
            kept.append(asyncio.ensure_future(client.statistics()))
            await asyncio.sleep(0.1)
            kept.append(client)

        kept = []
        asyncio.run(main())
        """,
    )


SERVER_SCRIPT = """
async def main():
    server = LightningStoreServer(InMemoryLightningStore(), port=int(sys.argv[1]))
    await server.start()
    print(server.endpoint, flush=True)
    await server.run_forever()

asyncio.run(main())
"""


def start_server(path: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own; returns it and its address."""
    script = path / "server.py"
    script.write_text(PREAMBLE + SERVER_SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


async def test_a_killed_server_is_no_stop_and_no_empty_queue(tmp_path: Path, connect: Any) -> None:
    process, address = await asyncio.to_thread(start_server, tmp_path)
    client = connect(address, retry_delays=(0.1,) * 100)
    assert await client.receive_commands("w", instance_id="i", timeout=0) == []
    commands = asyncio.ensure_future(client.receive_commands("w", instance_id="i"))
    claim = asyncio.ensure_future(client.claim_rollouts(worker_id="w"))
    await client.statistics()
    kill(process)
    process, _ = await asyncio.to_thread(start_server, tmp_path, int(address.split(":")[1]))
    try:
        await client.wait_until_ready(DEADLINE_SECONDS)
        await client.enqueue_rollout("after")
        (claimed,) = await asyncio.wait_for(claim, DEADLINE_SECONDS)
        assert claimed.input == "after"
        assert not commands.done()
        await client.update_rollout(claimed.rollout_id, status="cancelled")
        await client.update_worker("w")
        commands.cancel()
        await asyncio.gather(commands, return_exceptions=True)
    finally:
        kill(process)


async def test_a_stopped_process_is_given_up_by_its_deadline(tmp_path: Path, connect: Any) -> None:
    """A server that hangs, here by SIGSTOP, is unavailable like one that is gone."""
    process, address = await asyncio.to_thread(start_server, tmp_path)
    try:
        client = connect(address, retry_delays=(), request_timeout=1.0)
        await client.statistics()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(client.statistics(), 10)
    finally:
        kill(process)


def test_no_two_calls_have_the_same_request_id(tmp_path: Path) -> None:
    """Not in a forked child, which inherits the generator, nor for users who seed theirs."""
    out = run_script(
        tmp_path,
        """
        import random
        from lightning.rpc.client import _new_id

        def ids():
            random.seed(7)
            return " ".join(_new_id() for _ in range(3)) + " "  # written at once: two processes share the pipe

        print(ids(), end="", flush=True)
        print(ids(), end="", flush=True)
        pid = os.fork()
        print(ids(), end="", flush=True)
        if pid == 0:
            os._exit(0)
        wait_for_child(pid)
        """,
    )
    assert len(set(out.split())) == 12


async def test_clients_that_come_and_go_in_a_process_leave_nothing_to_the_next(tmp_path: Path) -> None:
    """What gRPC still had to say of a closed client's stream would be said on the loop of the next client: seldom, so
    that it takes many, and processes that are in each other's way."""
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    body = """
        async def ask():
            client = LightningStoreClient(sys.argv[1])
            await client.enqueue_rollout(1)
            await asyncio.gather(*(client.statistics() for _ in range(5)))
            await client.close()

        for _ in range(80):
            asyncio.run(ask())
        """
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    try:
        await asyncio.gather(
            *(asyncio.to_thread(run_script, folder, body, server.endpoint) for folder in folders)
        )
    finally:
        await server.close()
