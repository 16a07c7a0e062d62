"""Running a server: its limits, its health, its access log, its metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    LimitExceededError,
    OverloadedError,
    PermissionDenied,
)
from lightning.rpc.service import SERVICE_NAME
from lightning.rpc.tokens import add_token
from lightning.store import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.persistence.abc import BackendFullError
from lightning.testing import FakeClock
from lightning.testing.records import make_span
from lightning.testing.unreliable import UnreliableStore
from lightning.types import PromptTemplate, RolloutConfig

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
DEADLINE_SECONDS = 20.0


async def eventually(look: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until the answer is yes."""
    until = time.monotonic() + DEADLINE_SECONDS
    while not await look():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


@pytest.fixture
async def channels() -> AsyncIterator[Callable[[LightningStoreServer], grpc.aio.Channel]]:
    """Makes channels, and closes them after the test."""
    made: list[grpc.aio.Channel] = []

    def make(server: LightningStoreServer) -> grpc.aio.Channel:
        made.append(grpc.aio.insecure_channel(server.endpoint))
        return made[-1]

    yield make
    for channel in made:
        await channel.close()


# --- Limits ----------------------------------------------------------------------------------------------------


async def test_the_number_of_streams_is_limited(serve: Any, connect: Any) -> None:
    server = await serve(max_streams=2)
    first, second, third = (connect(server.endpoint) for _ in range(3))
    assert not await first.receive_commands("w-1", timeout=0)
    assert not await second.receive_commands("w-2", timeout=0)
    with pytest.raises(
        LimitExceededError, match=r"2 streams open already; raise max_streams .*--max-streams"
    ):
        await third.receive_commands("w-3", timeout=0)
    assert (await third.statistics())["total_rollouts"] == 0  # what is no stream is let in
    await first.close()

    async def there_is_room() -> bool:
        try:
            return list(await third.query_rollouts()) == []
        except LimitExceededError:
            return False

    await eventually(there_is_room)


async def test_what_is_worked_on_is_limited(serve: Any, connect: Any) -> None:
    class Slow(InMemoryLightningStore):
        """Keeps what it is given until it is told to go on."""

        def __init__(self) -> None:
            super().__init__()
            self.begun = asyncio.Event()
            self.may_end: Future[None] = Future()

        async def add_resources(self, resources: Any) -> Any:
            loop.call_soon_threadsafe(self.begun.set)
            await asyncio.wrap_future(self.may_end)
            return await super().add_resources(resources)

    loop = asyncio.get_running_loop()
    store = Slow()
    server = await serve(store, max_message_bytes=60_000, max_in_flight_bytes=100_000)
    client = connect(server.endpoint)

    slow = asyncio.ensure_future(client.add_resources({"p": PromptTemplate(template="x" * 50_000)}))
    await asyncio.wait_for(store.begun.wait(), DEADLINE_SECONDS)
    with pytest.raises(LimitExceededError, match=r"no room for \d+ more.*raise max_in_flight_bytes"):
        await client.enqueue_rollout("y" * 55_000)
    await client.enqueue_rollout("y" * 10_000)
    store.may_end.set_result(None)
    assert (await slow).version == 1
    await client.enqueue_rollout("y" * 55_000)
    assert (await client.statistics())["total_rollouts"] == 2


async def test_the_rate_of_calls_is_limited_by_client(
    serve: Any, connect: Any, tmp_path: Path, channels: Any
) -> None:
    tokens = [add_token(tmp_path / "tokens.json", "viewer", name, None)[0] for name in ("quick", "other")]
    server = await serve(tokens=tmp_path / "tokens.json", max_calls_per_second=0.001)
    quick, other = (connect(server.endpoint, token=token) for token in tokens)
    await quick.statistics()
    with pytest.raises(OverloadedError, match=r"'quick' makes more than 0\.001 calls.*max_calls_per_second"):
        await quick.statistics()
    await other.statistics()
    health = health_pb2_grpc.HealthStub(channels(server))
    for _ in range(3):  # which nobody is kept from
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVING


async def test_calls_that_break_off_leave_no_room_taken(serve: Any, channels: Any, caplog: Any) -> None:
    """Whatever happens to calls: what they took is given back, to the last byte."""
    caplog.set_level(logging.INFO, logger="lightning.access")
    server = await serve(max_streams=5, max_message_bytes=10_000, max_in_flight_bytes=20_000, access_log=True)
    stub = LightningStoreServiceStub(channels(server))
    calls: list[Any] = []
    for number in range(60):
        kind = number % 4
        if kind == 0:
            calls.append(
                stub.DequeueRollouts(pb.DequeueRolloutsRequest(limit=1, wait_seconds=50), timeout=50)
            )
        elif kind == 1:
            stream = stub.WorkerSession(timeout=50)
            with suppress(grpc.aio.AioRpcError):  # there may be too many
                await stream.write(pb.WorkerSessionRequest(hello={"worker_id": f"w-{number}"}))
            calls.append(stream)
        elif kind == 2:
            calls.append(stub.UpdateRollout(pb.UpdateRolloutRequest(rollout_id="x" * 5000), timeout=0.0005))
        else:
            calls.append(stub.QuerySpans(pb.QuerySpansRequest(rollout_id="ro-1"), timeout=50))
    for call in calls:
        call.cancel()
    admission = server._running.admission

    async def nothing_is_held() -> bool:
        return (admission.streams, admission.held_bytes) == (0, 0)

    await eventually(nothing_is_held)
    (answer,) = [update async for update in stub.QueryRollouts(pb.QueryRolloutsRequest(), timeout=10)]
    assert answer.page_info.total == 0


async def test_a_client_waits_for_its_turn(serve: Any, connect: Any) -> None:
    client = connect((await serve(max_calls_per_second=20)).endpoint, retry_delays=(0.05,) * 40)
    stored = await asyncio.gather(*(client.enqueue_rollout(number) for number in range(30)))
    assert len({rollout.rollout_id for rollout in stored}) == 30


async def test_a_burst_within_the_rate_is_let_in(serve: Any, connect: Any) -> None:
    client = connect((await serve(max_calls_per_second=1000)).endpoint)
    await asyncio.gather(*(client.statistics() for _ in range(100)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_streams": 0}, "max_streams must be a number of streams"),
        ({"max_streams": 1.5}, "max_streams"),
        ({"max_in_flight_bytes": 1}, "max_in_flight_bytes must be at least max_message_bytes"),
        ({"max_calls_per_second": 0}, "max_calls_per_second must be a positive number"),
        ({"max_calls_per_second": float("nan")}, "max_calls_per_second"),
        ({"metrics_port": -1}, "port must be between"),
    ],
)
def test_bad_limits_are_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LightningStoreServer(InMemoryLightningStore(), port=0, **options)


# --- Health ----------------------------------------------------------------------------------------------------


async def test_health_follows_whether_the_store_can_write(
    server: LightningStoreServer, store: UnreliableStore, connect: Any, channels: Any
) -> None:
    stub = health_pb2_grpc.HealthStub(channels(server))
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=DEADLINE_SECONDS)
    assert (await watch.read()).status == SERVING
    store.away = True
    with pytest.raises(ConnectionError):
        await connect(server.endpoint, retry_delays=()).enqueue_rollout(1)
    assert (await watch.read()).status == NOT_SERVING
    for service in ("", SERVICE_NAME):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == NOT_SERVING
    store.away = False
    assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_an_error_of_the_caller_is_no_matter_of_health(
    server: LightningStoreServer, connect: Any, channels: Any
) -> None:
    with pytest.raises(ValueError, match="ro-1"):
        await connect(server.endpoint).update_rollout("ro-1", mode="train")
    stub = health_pb2_grpc.HealthStub(channels(server))
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVING


async def test_sqlite_tells_whether_it_can_write(tmp_path: Path) -> None:
    store = SQLiteLightningStore(tmp_path / "store.db")
    await store.check_writable()
    before = await store.statistics()
    await store.check_writable()
    assert {**await store.statistics(), "uptime": 0} == {**before, "uptime": 0}
    await store.close()


async def test_health_follows_the_room_on_the_disk(
    serve: Any, connect: Any, tmp_path: Path, channels: Any
) -> None:
    store = SQLiteLightningStore(tmp_path / "store.db")
    server = await serve(store)
    client = connect(server.endpoint)
    await client.enqueue_rollout(1)

    async def limit_pages(spare: int | None) -> None:
        def limit(session: Any) -> None:
            (pages,) = session.connection.execute("PRAGMA page_count").fetchone()
            most = 2**31 if spare is None else pages + spare
            session.connection.execute(f"PRAGMA max_page_count = {most}")

        await store._persistence._writer.submit(limit)  # type: ignore[attr-defined]

    stub = health_pb2_grpc.HealthStub(channels(server))
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=DEADLINE_SECONDS)
    assert (await watch.read()).status == SERVING
    await limit_pages(0)
    with pytest.raises(BackendFullError, match="no room left"):
        await client.enqueue_rollout("x" * 100_000)
    assert (await watch.read()).status == NOT_SERVING
    await limit_pages(None)
    assert (await watch.read()).status == SERVING
    await client.enqueue_rollout("x" * 100_000)
    watch.cancel()


# --- The access log --------------------------------------------------------------------------------------------


async def test_the_access_log_has_a_line_for_each_call(
    serve: Any, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, channels: Any
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.access")
    token, _ = add_token(tmp_path / "tokens.json", "viewer", "wall", None)
    server = await serve(tokens=tmp_path / "tokens.json", access_log=True)
    client = connect(server.endpoint, token=token)
    await client.query_rollouts()
    with pytest.raises(PermissionDenied):
        await client.enqueue_rollout("a secret input")
    with pytest.raises(grpc.aio.AioRpcError):
        await LightningStoreServiceStub(channels(server)).GetRollout(pb.GetRolloutRequest(), timeout=10)

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "lightning.access"]

    async def all_are_there() -> bool:
        return len(lines()) == 3

    await eventually(all_are_there)
    form = (
        rf"/{SERVICE_NAME}/(\w+) peer=ipv4:127\.0\.0\.1:\d+ token=(\S+) certificate=- code=(\w+) "
        r"seconds=(\d+\.\d{6}) in=(\d+) out=(\d+)"
    )
    found = [re.fullmatch(form, line) for line in lines()]
    assert [match and match.group(1, 2, 3) for match in found] == [
        ("QueryRollouts", "wall", "OK"),
        ("EnqueueRollouts", "wall", "PERMISSION_DENIED"),
        ("GetRollout", "-", "UNAUTHENTICATED"),
    ]
    assert found[0] is not None
    assert int(found[0][6]) > 0
    assert token not in caplog.text
    assert "secret" not in caplog.text


# --- Metrics ---------------------------------------------------------------------------------------------------


async def scrape(server: LightningStoreServer) -> dict[str, float]:
    """What the metrics are, by name with labels."""
    assert server.metrics_url is not None
    url: str = server.metrics_url

    def get() -> str:
        with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(get)
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def test_metrics_tell_what_happened(serve: Any, connect: Any) -> None:
    clock = FakeClock()
    server = await serve(InMemoryLightningStore(clock=clock), metrics_port=0)
    client: LightningStoreClient = connect(server.endpoint)
    started = await client.start_rollout(1, config=RolloutConfig(timeout_seconds=5))
    await client.add_span(make_span(started))
    await client.enqueue_rollout(2)
    clock.advance(10)
    assert not await client.receive_commands("w-1", timeout=0)
    with pytest.raises(ValueError, match="ro-1"):
        await client.update_rollout("ro-1", mode="train")

    async def counted() -> bool:  # calls are counted a moment after they were answered
        return (await scrape(server)).get(f'{calls},method="UpdateRollout",service="{SERVICE_NAME}"}}') == 1

    calls = 'lightning_calls_total{code="NOT_FOUND"'
    await eventually(counted)
    found = await scrape(server)
    labels = f'method="AddSpans",service="{SERVICE_NAME}"'
    assert found[f'lightning_calls_total{{code="OK",{labels}}}'] == 1
    assert found[f"lightning_call_seconds_count{{{labels}}}"] == 1
    assert found[f"lightning_received_bytes_total{{{labels}}}"] > 100
    assert found[f"lightning_sent_bytes_total{{{labels}}}"] > 0
    # the session, and the pipeline by which the client makes its calls
    assert found["lightning_streams"] == found["lightning_calls_in_flight"] == 2
    assert found["lightning_queue_length"] == 1
    assert found["lightning_oldest_queued_seconds"] == 10
    assert found['lightning_rollouts{status="failed"}'] == 1
    assert found['lightning_attempts{status="timeout"}'] == 1
    assert found['lightning_expired_attempts_total{status="timeout"}'] == 1
    assert found["lightning_spans"] == 1
    assert found["lightning_span_bytes"] > 0
    assert found["lightning_serving"] == found["lightning_store_up"] == 1


async def test_metrics_of_a_store_that_is_away(
    serve: Any, store: UnreliableStore, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve(store, metrics_port=0)
    store.away = True
    with pytest.raises(ConnectionError):
        await connect(server.endpoint, retry_delays=()).enqueue_rollout(1)
    found = await scrape(server)
    assert found["lightning_store_up"] == 0
    assert "lightning_queue_length" not in found

    async def told() -> bool:
        return (await scrape(server))["lightning_serving"] == 0

    await eventually(told)


async def test_a_taken_port_for_metrics_is_a_clear_error_and_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = LightningStoreServer(InMemoryLightningStore(), port=0, metrics_port=port)
        with pytest.raises(OSError, match=f"port {port}: .*in use.*choose another port"):
            await server.start()
        assert server.metrics_url is None
        await server.close()


async def test_the_page_lists_what_is_shown(serve: Any, connect: Any) -> None:
    server = await serve(metrics_port=0)
    await connect(server.endpoint).statistics()
    documented = set(re.findall(r"^\| `(lightning_\w+)[{`]", PAGE, re.MULTILINE))
    names = {name.partition("{")[0] for name in await scrape(server)}
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in names if not name.endswith("_created")}
    optional = {
        "lightning_attempts",
        "lightning_expired_attempts_total",
        "lightning_rollouts",
        "lightning_evicted_spans_total",
    }
    assert shown <= documented
    assert documented - shown <= optional
