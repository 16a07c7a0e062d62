"""The server's life: starting, being reached, draining, stopping."""

from __future__ import annotations

import asyncio
import gc
import pickle
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lightningpb.v1 import errors_pb2, rollout_pb2
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    StoreDrainingError,
    StoreUnavailableError,
)
from lightning.rpc import loop as grpc_loop
from lightning.rpc.service import SERVICE_NAME
from lightning.store import InMemoryLightningStore
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Stop

pytestmark = pytest.mark.anyio

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_port_0_picks_a_free_port(server: LightningStoreServer) -> None:
    assert server.port > 0
    assert server.endpoint == f"127.0.0.1:{server.port}"


async def test_before_it_starts_a_picked_port_is_not_known() -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    with pytest.raises(RuntimeError, match="start it first"):
        _ = server.endpoint
    await server.close()


async def test_the_owner_calls_the_store_directly(
    server: LightningStoreServer, store: UnreliableStore
) -> None:
    rollout = await server.enqueue_rollout({"task": 1})
    assert (await server.dequeue_rollout()).rollout_id == rollout.rollout_id  # type: ignore[union-attr]
    assert store.calls["enqueue_rollout"] == 1
    assert server.capabilities["thread_safe"]


async def test_it_may_be_used_before_it_starts_and_after_it_stopped() -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.enqueue_rollout(1)
    await server.start()
    await server.enqueue_rollout(2)
    await server.stop()
    assert [rollout.input for rollout in await server.query_rollouts()] == [1, 2]
    await server.close()


async def test_starting_twice_and_stopping_twice_do_no_harm(server: LightningStoreServer) -> None:
    port = server.port
    await server.start()
    assert server.port == port
    await server.stop()
    await server.stop()


async def test_it_can_be_started_again(server: LightningStoreServer, client: LightningStoreClient) -> None:
    rollout = await client.enqueue_rollout(1)
    await server.stop()
    await server.start()
    found = await client.get_rollout_by_id(rollout.rollout_id)
    assert found == rollout


async def test_a_taken_port_is_a_clear_error(server: LightningStoreServer) -> None:
    second = LightningStoreServer(InMemoryLightningStore(), port=server.port)
    with pytest.raises(OSError, match=f"port {server.port}: .*in use.*choose another port"):
        await second.start()
    await second.close()


async def test_a_port_taken_by_another_program_too() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = LightningStoreServer(InMemoryLightningStore(), port=other.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            await server.start()
        await server.close()


async def test_a_host_that_is_not_here_is_a_clear_error() -> None:
    server = LightningStoreServer(InMemoryLightningStore(), "192.0.2.1", 0, allow_insecure=True)
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1:0"):
        await server.start()
    await server.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_plaintext_beyond_this_machine_needs_a_word(host: str) -> None:
    with pytest.raises(ValueError, match="allow_insecure=True"):
        LightningStoreServer(InMemoryLightningStore(), host)


async def test_a_wildcard_is_served_when_asked_for(serve: Any, connect: Any) -> None:
    server = await serve(host="0.0.0.0", allow_insecure=True)
    assert server.endpoint == f"127.0.0.1:{server.port}"
    assert (await connect(server.endpoint).statistics())["total_rollouts"] == 0


def test_what_is_no_store_is_refused() -> None:
    with pytest.raises(TypeError, match="int is no LightningStore"):
        LightningStoreServer(3)


@pytest.mark.parametrize(
    "option",
    [
        {"max_message_bytes": 0},
        {"max_message_bytes": 2**31},
        {"max_wait_seconds": float("nan")},
        {"remembered_seconds": -1},
        {"remembered_bytes": -1},
        {"remembered_bytes": "many"},
    ],
)
def test_a_bad_limit_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        LightningStoreServer(InMemoryLightningStore(), **option)


async def test_any_object_with_the_methods_is_served(serve: Any, connect: Any) -> None:
    class Foreign:
        """Passes calls on, and derives from nothing. It knows neither claims with a time limit nor heartbeats."""

        def __init__(self) -> None:
            self._store = InMemoryLightningStore()

        def __getattr__(self, name: str) -> Any:
            if name in ("claim_rollouts", "send_heartbeat", "receive_commands", "send_command"):
                raise AttributeError(name)
            return getattr(self._store, name)

    client = connect((await serve(Foreign())).endpoint)
    waiting = asyncio.ensure_future(client.claim_rollouts(worker_id="w", timeout=10))
    rollout = await client.enqueue_rollout("task")
    assert [claimed.rollout_id for claimed in await waiting] == [rollout.rollout_id]
    assert (await client.update_worker("w", {"a": 1})).heartbeat_stats == {"a": 1}


async def test_a_pickled_server_is_a_client(server: LightningStoreServer) -> None:
    await server.enqueue_rollout("task")
    copy: LightningStoreServer = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(server))))
    assert copy.endpoint == server.endpoint
    assert [rollout.input for rollout in await copy.query_rollouts()] == ["task"]
    assert not copy.capabilities["zero_copy"]
    with pytest.raises(RuntimeError, match="process that made it"):
        await copy.start()
    with pytest.raises(RuntimeError, match="process that made it"):
        await copy.stop()
    await copy.close()
    assert (await server.statistics())["total_rollouts"] == 1


async def test_run_forever_returns_when_stopped() -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    running = [asyncio.ensure_future(server.run_forever()) for _ in range(2)]
    await asyncio.sleep(0)
    await server.stop()
    await asyncio.wait_for(asyncio.gather(*running), 10)
    await server.close()


async def test_run_forever_stops_when_cancelled() -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    running = asyncio.ensure_future(server.run_forever())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", server.port))
    await server.close()


async def test_a_busy_caller_does_not_hold_it_up(server: LightningStoreServer) -> None:
    """The server's loop is its own, so it answers while this one is blocked."""

    def call() -> int:
        async def count() -> int:
            client = LightningStoreClient(server.endpoint)
            rollouts = await client.query_rollouts()
            await client.close()
            return rollouts.total

        return asyncio.run(count())

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(call).result(10) == 0  # this loop is blocked until then


async def test_a_forgotten_server_gives_back_what_it_holds() -> None:
    shares = grpc_loop._shared.shares
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    await server.start()
    address = ("127.0.0.1", server.port)
    assert grpc_loop._shared.shares == shares + 1
    del server
    gc.collect()
    deadline = time.monotonic() + 10
    while grpc_loop._shared.shares > shares:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


# --- Draining --------------------------------------------------------------------------------------------------


async def test_stop_ends_long_polls_and_streams_at_once(
    server: LightningStoreServer, store: UnreliableStore, connect: Any
) -> None:
    rollout = await server.start_rollout("task")
    client = connect(server.endpoint, retry_delays=())
    waiting = [
        asyncio.ensure_future(client.claim_rollouts()),
        asyncio.ensure_future(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id])),
        asyncio.ensure_future(client.receive_commands("w", instance_id="i")),
    ]
    await store.wait_for_calls("claim_rollouts")
    await store.wait_for_calls("wait_for_rollouts")
    await store.wait_for_calls("receive_commands", 2)
    began = time.monotonic()
    await server.stop(grace=30)
    assert time.monotonic() - began < 5
    for call in waiting:
        with pytest.raises(StoreUnavailableError, match=server.endpoint):
            await asyncio.wait_for(call, 10)


async def test_stop_finishes_what_is_in_flight(serve: Any, connect: Any) -> None:
    class Slow(InMemoryLightningStore):
        begun = asyncio.Event()
        may_end: Future[None] = Future()

        async def add_resources(self, resources: Any) -> Any:
            loop.call_soon_threadsafe(self.begun.set)
            await asyncio.wrap_future(self.may_end)
            return await super().add_resources(resources)

    loop = asyncio.get_running_loop()
    store = Slow()
    server = await serve(store)
    client = connect(server.endpoint, retry_delays=())
    call = asyncio.ensure_future(client.add_resources({}))
    await asyncio.wait_for(store.begun.wait(), 10)
    stopping = asyncio.ensure_future(server.stop(grace=30))
    await drained(server, client)
    with pytest.raises(StoreDrainingError, match="the server was stopped"):
        await client.statistics()
    assert not call.done()
    store.may_end.set_result(None)
    assert (await call).version == 1
    await stopping


async def drained(server: LightningStoreServer, client: LightningStoreClient) -> None:
    """Wait until new calls are refused."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            await client.get_worker_by_id("nobody")
        except StoreUnavailableError:
            return
    raise AssertionError("the server does not drain")


async def test_what_takes_longer_than_the_grace_is_cancelled(serve: Any, connect: Any) -> None:
    class Stuck(InMemoryLightningStore):
        begun = asyncio.Event()

        async def add_resources(self, resources: Any) -> Any:
            loop.call_soon_threadsafe(self.begun.set)
            await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    store = Stuck()
    server = await serve(store)
    call = asyncio.ensure_future(connect(server.endpoint, retry_delays=()).add_resources({}))
    await asyncio.wait_for(store.begun.wait(), 10)
    await server.stop(grace=0.05)
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(call, 10)


async def test_workers_are_told_to_stop_when_the_job_is_over(
    server: LightningStoreServer, store: UnreliableStore, connect: Any
) -> None:
    client = connect(server.endpoint)
    listening = [
        asyncio.ensure_future(client.receive_commands(worker, instance_id=instance))
        for worker, instance in (("w-1", "a"), ("w-1", "b"), ("w-2", None))
    ]
    await store.wait_for_calls("receive_commands", 6)
    await server.stop(reason="the algorithm has finished", stop_workers=True)
    for call in listening:
        assert await asyncio.wait_for(call, 10) == [Stop(reason="the algorithm has finished")]


async def test_a_command_sent_just_before_the_end_arrives(
    server: LightningStoreServer, store: UnreliableStore, connect: Any
) -> None:
    listening = asyncio.ensure_future(connect(server.endpoint).receive_commands("w", instance_id="i"))
    await store.wait_for_calls("receive_commands", 2)
    assert await server.send_command(Stop(reason="done")) == 1
    await server.stop()
    assert await asyncio.wait_for(listening, 10) == [Stop(reason="done")]


# --- What any gRPC client can do -------------------------------------------------------------------------------


@pytest.fixture
def channel(server: LightningStoreServer) -> Any:
    """A synchronous channel: a client that knows nothing of this package. Used from a thread."""
    with grpc.insecure_channel(server.endpoint) as channel:
        yield channel


async def test_health_is_told_per_service(server: LightningStoreServer, channel: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    def check(service: str) -> Any:
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    assert await asyncio.to_thread(check, "") == SERVING
    assert await asyncio.to_thread(check, SERVICE_NAME) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(check, "nothing.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_who_watches_the_health_sees_the_drain(server: LightningStoreServer, channel: Any) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=30
    )
    seen = [(await asyncio.to_thread(next, watch)).status]
    began = time.monotonic()
    await server.stop(grace=30)
    assert time.monotonic() - began < 5

    def rest() -> list[Any]:
        statuses = []
        with suppress(grpc.RpcError):  # the end of the server
            statuses.extend(answer.status for answer in watch)
        return statuses

    seen += await asyncio.to_thread(rest)
    assert seen == [SERVING, NOT_SERVING]


async def test_reflection_lists_the_services(server: LightningStoreServer, channel: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(request: Any) -> Any:
        return next(stub.ServerReflectionInfo(iter([request]), timeout=10))

    answer = await asyncio.to_thread(ask, reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
    answer = await asyncio.to_thread(
        ask, reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
    )
    assert answer.file_descriptor_response.file_descriptor_proto


async def test_an_error_has_status_message_and_detail(channel: Any) -> None:
    stub = LightningStoreServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(
            stub.GetLatestAttempt, pb.GetLatestAttemptRequest(rollout_id="ro-1"), timeout=10
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "ro-1" in caught.value.details()
    (value,) = (value for key, value in caught.value.trailing_metadata() if key == "lightning-error-bin")
    detail = errors_pb2.ErrorDetail.FromString(value)
    assert detail.reason == errors_pb2.ERROR_REASON_UNKNOWN_ID
    assert "ro-1" in detail.message


@pytest.mark.parametrize("method", ["GetRollout", "EnqueueRollouts", "QueryRollouts"])
async def test_bytes_that_are_no_message_are_refused(channel: Any, method: str) -> None:
    shape = channel.unary_stream if method.startswith("Query") else channel.unary_unary
    call = shape(f"/{SERVICE_NAME}/{method}")

    def send() -> Any:
        answer = call(b"\xff\xff\xff", timeout=10)
        return list(answer) if method.startswith("Query") else answer

    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(send)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{method}Request" in caught.value.details()


async def test_a_request_id_has_a_length_that_can_be_kept(channel: Any) -> None:
    stub = LightningStoreServiceStub(channel)
    request = pb.EnqueueRolloutsRequest(request_id="x" * 257)
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(stub.EnqueueRollouts, request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id" in caught.value.details()


async def test_a_call_without_a_request_id_is_made_each_time(channel: Any, store: UnreliableStore) -> None:
    stub = LightningStoreServiceStub(channel)
    spec = rollout_pb2.RolloutSpec(input_json=b"1")
    for request_id in ("", "", "same", "same"):
        request = pb.EnqueueRolloutsRequest(request_id=request_id, specs=[spec])
        await asyncio.to_thread(stub.EnqueueRollouts, request, timeout=10)
    assert store.calls["enqueue_many_rollouts"] == 3


async def test_a_method_of_another_version_is_not_known(channel: Any, server: LightningStoreServer) -> None:
    def call() -> Any:
        return channel.unary_unary(f"/{SERVICE_NAME}/Invented")(b"", timeout=10)

    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_server_says_what_it_is(channel: Any) -> None:
    stub = LightningStoreServiceStub(channel)
    info = await asyncio.to_thread(stub.GetServerInfo, pb.GetServerInfoRequest(), timeout=10)
    assert info.store_class == "UnreliableStore"
    assert info.server_version
    assert info.server_instance_id
    assert info.capabilities.thread_safe
    assert info.max_receive_message_bytes == info.max_send_message_bytes == 256 * 1024 * 1024
