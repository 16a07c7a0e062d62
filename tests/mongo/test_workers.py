"""`lightning store --workers`: several processes at one port, on one MongoDB."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import psutil
import pytest
from lightningpb.v1 import store_service_pb2 as pb
from server import Mongod

from lightning.cli.errors import CommandError
from lightning.cli.serving import check_workers
from lightning.execution import restarts, server_fleet
from lightning.execution.base import ExecutionError
from lightning.execution.child import ParentLink
from lightning.execution.entries import Serving
from lightning.execution.server_fleet import ServerFleet
from lightning.rpc import LightningStoreClient
from lightning.rpc.address import PortReservation, check_listener, check_port_is_free
from lightning.store.persistence.abc import BackendOpenError
from lightning.types import EnqueueRolloutRequest, Rollout

WORKERS = 3
DEADLINE_SECONDS = 60
RETRY_DELAYS_SECONDS = (0.2,) * 100
Process = subprocess.Popen[str]


@contextmanager
def serving(mongod: Mongod, partition: str) -> Iterator[Process]:
    url = f"mongodb://{mongod.host}/lightning?directConnection=true#{partition}"
    words = ["store", "--workers", str(WORKERS), "--port", "0", "--backend", url, "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-um", "lightning", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()  # as their parent is, they are gone in a moment
        process.communicate()
        psutil.wait_procs(children, DEADLINE_SECONDS)


def endpoint_of(process: Process) -> str:
    assert process.stdout is not None
    found = re.search(r" at (\S+), Ctrl-C ends it", process.stdout.readline())
    assert found is not None
    return found.group(1)


def servers_of(process: Process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):
            if any(part.startswith("store-server-") for part in child.cmdline()):
                found.append(child)
    return found


async def connect_to_all(endpoint: str, stack: AsyncExitStack) -> list[LightningStoreClient]:
    """A client of each process: the kernel spreads the connections, at random."""
    by_server: dict[str, LightningStoreClient] = {}
    while len(by_server) < WORKERS:
        client = LightningStoreClient(endpoint, retry_delays=RETRY_DELAYS_SECONDS)
        stack.push_async_callback(client.close)
        about = await client._call("GetServerInfo", pb.GetServerInfoRequest())
        by_server.setdefault(about.server_instance_id, client)
    return list(by_server.values())


@pytest.mark.anyio
async def test_they_are_one_store(replica_set: Mongod, partition: str) -> None:
    """Until SIGTERM, which drains all of them; one that is killed meanwhile is replaced."""
    async with AsyncExitStack() as stack:
        process = stack.enter_context(serving(replica_set, partition))
        endpoint = await asyncio.to_thread(endpoint_of, process)
        clients = await connect_to_all(endpoint, stack)
        requests = [EnqueueRolloutRequest(input=number) for number in range(30)]
        made = await clients[0].enqueue_many_rollouts(requests)
        waiting = asyncio.ensure_future(
            clients[1].wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in made])
        )

        async def work(client: LightningStoreClient, name: str) -> list[str]:
            done: list[str] = []
            while len(done) < 5:
                for rollout in await client.claim_rollouts(worker_id=name, timeout=DEADLINE_SECONDS):
                    await client.update_attempt(
                        rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded"
                    )
                    done.append(rollout.rollout_id)
            return done

        half = await asyncio.gather(*(work(client, f"w-{n}") for n, client in enumerate(clients)))
        before = servers_of(process)
        assert len(before) == WORKERS
        before[1].kill()
        rest = await asyncio.gather(*(work(client, f"w-{n}") for n, client in enumerate(clients)))
        claimed = [rollout_id for part in (*half, *rest) for rollout_id in part]
        assert sorted(claimed) == sorted(rollout.rollout_id for rollout in made)
        ended: list[Rollout] = await asyncio.wait_for(waiting, DEADLINE_SECONDS)
        assert {rollout.status for rollout in ended} == {"succeeded"}
        await connect_to_all(endpoint, stack)  # the new one serves, too
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, DEADLINE_SECONDS) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        output = process.stdout.read()
        assert len(re.findall(r"metrics: +http://127\.0\.0\.1:\d+/metrics", output)) == WORKERS
        assert "ending: new calls are refused, those under way are finished" in output
        assert "was killed by SIGKILL; it is restarted (1 of 3)" in process.stderr.read()


@pytest.mark.parametrize("backend", ["memory", "sqlite:store.db"])
def test_a_store_for_one_process_is_refused(backend: str) -> None:
    with pytest.raises(
        CommandError, match=rf"--workers 2 needs .*mongodb://.*{backend.partition(':')[0]} is for one"
    ):
        check_workers(2, backend, None)
    check_workers(1, backend, 9464)


def test_there_must_be_a_port_for_the_metrics_of_each() -> None:
    with pytest.raises(CommandError, match="4 ports from 65533 on"):
        check_workers(4, "mongodb://localhost", 65533)


class TestPortReservation:
    def test_it_keeps_others_out_and_lets_its_own_in(self) -> None:
        reservation = PortReservation(check_listener("127.0.0.1", 0))
        endpoint = check_listener("127.0.0.1", reservation.port)
        shared = [socket.socket() for _ in range(2)]
        for one in shared:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", reservation.port))
            one.listen()
        with pytest.raises(OSError, match=f"port {reservation.port}.*in use"):
            check_port_is_free(endpoint)
        with pytest.raises(OSError, match=f"port {reservation.port}.*in use"):
            PortReservation(endpoint)
        for one in shared:
            one.close()
        reservation.close()
        check_port_is_free(endpoint)


async def fail(link: ParentLink) -> None:
    raise BackendOpenError("there is no such store")


async def die(link: ParentLink) -> None:
    link.report(Serving("127.0.0.1:1", {}, None))
    os._exit(7)


async def live(link: ParentLink) -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    link.report(Serving("127.0.0.1:1", {}, None))
    await told.wait()


@pytest.mark.anyio
async def test_what_is_wrong_with_one_is_what_is_wrong() -> None:
    fleet = ServerFleet([fail, live], DEADLINE_SECONDS)
    with pytest.raises(BackendOpenError, match="there is no such store"):
        await fleet.start()
    await fleet.stop()


@pytest.mark.anyio
async def test_one_that_dies_again_and_again_is_the_end_of_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restarts, "_RESTART_DELAYS_SECONDS", (0.0,))
    monkeypatch.setattr(server_fleet, "RESTARTS", 1)
    fleet = ServerFleet([live, die], DEADLINE_SECONDS)
    await fleet.start()
    with pytest.raises(ExecutionError, match="store-server-1 .* exit code 7, and had been restarted 1 times"):
        await fleet.run()
    await fleet.stop()
    assert [record.message.partition("; ")[2] for record in caplog.records] == ["it is restarted (1 of 1)"]
