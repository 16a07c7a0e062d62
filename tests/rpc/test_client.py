"""The client by itself: where and how it may be used. What its verbs do is the contract suite's business."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer, LimitExceededError, loop
from lightning.rpc import client as client_module
from lightning.testing import make_span
from lightning.testing.unreliable import UnreliableStore
from lightning.types import EnqueueRolloutRequest

pytestmark = pytest.mark.anyio


# --- Where it may be used --------------------------------------------------------------------------------------


async def test_it_is_used_from_many_loops_and_threads(
    server: LightningStoreServer, client: LightningStoreClient
) -> None:
    def work(number: int) -> None:
        async def calls() -> None:
            for step in range(10):
                await client.enqueue_rollout(f"{number}-{step}")

        asyncio.run(calls())

    with ThreadPoolExecutor(8) as executor:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.run_in_executor(executor, work, number) for number in range(8)])
    inputs = {rollout.input for rollout in await client.query_rollouts()}
    assert inputs == {f"{number}-{step}" for number in range(8) for step in range(10)}


async def test_a_process_has_one_channel_and_one_thread_for_it(
    server: LightningStoreServer, client: LightningStoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    before = {thread.name for thread in threading.enumerate()}

    async def call() -> None:
        await client.statistics()

    for _ in range(3):
        await asyncio.to_thread(asyncio.run, call())
    await call()
    after = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in after if "lightning" in name}, (
        "the server's thread serves the client as well"
    )
    assert not caplog.records, "nothing complains about the loops that were closed"


async def test_an_unused_client_costs_nothing() -> None:
    client = LightningStoreClient("127.0.0.1:4747")
    assert loop._shared.shares == 0
    await client.close()
    assert loop._shared.shares == 0


async def test_closing_ends_calls_in_flight(client: LightningStoreClient, store: UnreliableStore) -> None:
    calls = [
        asyncio.ensure_future(client.claim_rollouts()),
        asyncio.ensure_future(client.receive_commands("w")),
    ]
    await store.wait_for_calls("claim_rollouts")
    await store.wait_for_calls("receive_commands", 2)
    await client.close()
    for call in calls:
        with pytest.raises(RuntimeError, match="was closed"):
            await asyncio.wait_for(call, 10)
    with pytest.raises(RuntimeError, match="was closed"):
        await client.statistics()
    await client.close()


async def test_closing_from_another_loop_works(client: LightningStoreClient) -> None:
    await client.statistics()
    await asyncio.to_thread(asyncio.run, client.close())
    with pytest.raises(RuntimeError, match="was closed"):
        await client.statistics()


async def test_a_forgotten_client_gives_back_what_it_holds(server: LightningStoreServer) -> None:
    shares = loop._shared.shares
    client = LightningStoreClient(server.endpoint)
    await client.statistics()
    assert loop._shared.shares == shares + 1
    del client
    gc.collect()
    await until(lambda: loop._shared.shares == shares)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something has happened that tells nobody."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.001)


async def test_a_pickled_client_takes_address_and_options_along(
    server: LightningStoreServer, client: LightningStoreClient
) -> None:
    await client.enqueue_rollout("task")
    copy: LightningStoreClient = pickle.loads(pickle.dumps(client))
    assert copy.endpoint == client.endpoint
    assert copy._options == client._options
    assert (await copy.statistics())["total_rollouts"] == 1
    await copy.close()
    assert (await client.statistics())["total_rollouts"] == 1


async def test_a_cancelled_call_leaves_the_client_usable(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    call = asyncio.ensure_future(client.claim_rollouts())
    await store.wait_for_calls("claim_rollouts")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await client.enqueue_rollout(1)
    assert len(await client.claim_rollouts(timeout=10)) == 1


async def test_what_it_can_do_it_says_without_asking() -> None:
    capabilities = LightningStoreClient("127.0.0.1:1").capabilities
    assert capabilities["thread_safe"]
    assert capabilities["async_safe"]
    assert not capabilities["zero_copy"]


@pytest.mark.parametrize("address", ["http://{}", "grpc://{}", "{}"])
async def test_addresses_as_people_write_them(
    server: LightningStoreServer, connect: Any, address: str
) -> None:
    assert (await connect(address.format(server.endpoint)).statistics())["total_rollouts"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"retry_delays": [-1]},
        {"retry_delays": "soon"},
        {"health_retry_delays": [math.nan]},
        {"request_timeout": 0},
        {"connection_timeout": math.inf},
        {"max_message_bytes": 0},
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LightningStoreClient("localhost:4747", **options)


async def test_a_proxy_for_the_web_is_not_asked_for_loopback(
    server: LightningStoreServer, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert (await connect(server.endpoint).statistics())["total_rollouts"] == 0


# --- Waiting ---------------------------------------------------------------------------------------------------


async def test_new_work_reaches_a_waiting_runner_in_milliseconds(client: LightningStoreClient) -> None:
    delays = []
    for number in range(10):
        claim = asyncio.ensure_future(client.claim_rollouts(worker_id="w"))
        await client.statistics()  # by then the claim is on its way
        began = time.monotonic()
        await client.enqueue_rollout(number)
        await asyncio.wait_for(claim, 10)
        delays.append(time.monotonic() - began)
    assert sorted(delays)[5] < 0.1


async def test_a_command_reaches_a_worker_in_milliseconds(client: LightningStoreClient) -> None:
    rollout = await client.start_rollout("task", worker_id="w")
    assert await client.receive_commands("w", timeout=0) == []
    listening = asyncio.ensure_future(client.receive_commands("w"))
    began = time.monotonic()
    await client.update_rollout(rollout.rollout_id, status="cancelled")
    (command,) = await asyncio.wait_for(listening, 10)
    assert command.kind == "cancel_attempt"
    assert time.monotonic() - began < 1


async def test_a_wait_may_be_longer_than_the_server_holds_a_call(
    serve: Any, connect: Any, store: UnreliableStore
) -> None:
    client = connect((await serve(store, max_wait_seconds=0.02)).endpoint)
    rollout = await client.start_rollout("task")
    claim = asyncio.ensure_future(client.claim_rollouts(timeout=60))
    wait = asyncio.ensure_future(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60))
    await store.wait_for_calls("claim_rollouts", 3)
    await store.wait_for_calls("wait_for_rollouts", 3)
    assert not claim.done()
    assert not wait.done()
    await client.enqueue_rollout("more")
    await client.update_attempt(rollout.rollout_id, "latest", status="failed")
    assert [claimed.input for claimed in await asyncio.wait_for(claim, 10)] == ["more"]
    assert [finished.status for finished in await asyncio.wait_for(wait, 10)] == ["failed"]


async def test_long_waits_are_made_of_several_calls(
    client: LightningStoreClient, store: UnreliableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_WAIT_SLICE_SECONDS", 0.02)
    rollout = await client.start_rollout("task")
    waits = [
        asyncio.ensure_future(client.claim_rollouts(timeout=60)),
        asyncio.ensure_future(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)),
    ]
    await store.wait_for_calls("claim_rollouts", 3)
    await store.wait_for_calls("wait_for_rollouts", 3)
    for wait in waits:
        assert not wait.done()
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    assert await client.claim_rollouts(timeout=0.1) == []
    assert await client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=0.1) == []


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True])
async def test_a_bad_timeout_is_refused(client: LightningStoreClient, timeout: Any) -> None:
    for call in (
        client.claim_rollouts(timeout=timeout),
        client.wait_for_rollouts(rollout_ids=[], timeout=timeout),
        client.receive_commands("w", timeout=timeout),
    ):
        with pytest.raises(ValueError, match="timeout"):
            await call


async def test_two_listeners_of_one_process_take_turns(server: LightningStoreServer, connect: Any) -> None:
    """The newer stream takes over; the older one hears so and does not fight for it."""
    older, newer = connect(server.endpoint), connect(server.endpoint)
    assert await older.receive_commands("w", instance_id="i", timeout=0) == []
    waiting = asyncio.ensure_future(older.receive_commands("w", instance_id="i"))
    assert await newer.receive_commands("w", instance_id="i", timeout=0) == []
    with pytest.raises(RuntimeError, match="another stream"):
        await asyncio.wait_for(waiting, 10)


async def test_a_worker_that_stops_listening_is_let_go(
    client: LightningStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.rpc.sessions._ABANDONED_AFTER_SECONDS", 0.01)
    assert await client.receive_commands("w", timeout=0) == []
    connection = client._connect()
    await until(lambda: not connection._sessions)
    assert await client.receive_commands("w", timeout=0) == []


# --- Size ------------------------------------------------------------------------------------------------------


async def test_a_large_result_comes_in_pieces(
    client: LightningStoreClient, server: LightningStoreServer
) -> None:
    """Far more than one message may hold, and with single records larger than a piece."""
    sizes = [10, 3_000_000, 500_000, 500_000, 500_000, 2_000_000, 10]
    await server.enqueue_many_rollouts([EnqueueRolloutRequest(input="x" * size) for size in sizes])
    found = await client.query_rollouts()
    assert [len(rollout.input) for rollout in found] == sizes
    assert found.total == len(sizes)


async def test_a_result_may_be_larger_than_a_message(serve: Any, connect: Any) -> None:
    server = await serve(max_message_bytes=3_000_000)
    client = connect(server.endpoint, max_message_bytes=3_000_000)
    for _ in range(5):
        await client.enqueue_rollout("x" * 2_000_000)
    assert (await client.query_rollouts()).total == 5


async def test_claims_take_no_more_than_an_answer_can_hold(serve: Any, connect: Any) -> None:
    server = await serve(max_message_bytes=1_000_000)
    client = connect(server.endpoint, max_message_bytes=1_000_000)
    for number in range(60):
        await client.enqueue_rollout([number, "x" * 10_000])
    seen: list[int] = []
    while claimed := await client.dequeue_many_rollouts(limit=100):
        seen += [rollout.input[0] for rollout in claimed]
    assert seen == list(range(60))
    ids = [rollout.rollout_id for rollout in await client.query_rollouts()]
    for rollout_id in ids:
        await server.update_attempt(rollout_id, "latest", status="succeeded")
    assert [r.rollout_id for r in await client.wait_for_rollouts(rollout_ids=ids, timeout=0)] == ids


async def test_a_request_too_large_for_the_server_names_the_setting(serve: Any, connect: Any) -> None:
    server = await serve(max_message_bytes=100_000)
    client = connect(server.endpoint)
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreServer"):
        await client.enqueue_rollout("x" * 200_000)
    assert (await client.enqueue_rollout("small")).status == "queuing"


async def test_an_answer_too_large_for_the_client_names_the_setting(
    server: LightningStoreServer, connect: Any
) -> None:
    client = connect(server.endpoint, max_message_bytes=100_000)
    rollout = await server.enqueue_rollout("x" * 200_000)
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreClient"):
        await client.get_rollout_by_id(rollout.rollout_id)
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreClient"):
        await client.query_rollouts()


async def test_an_answer_too_large_for_the_server_names_the_setting(serve: Any, connect: Any) -> None:
    server = await serve(max_message_bytes=100_000)
    rollout = await server.enqueue_rollout("x" * 200_000)
    client = connect(server.endpoint)
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreServer"):
        await client.get_rollout_by_id(rollout.rollout_id)
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreServer"):
        await client.query_rollouts()


async def test_a_large_task_arrives(client: LightningStoreClient) -> None:
    task = "ü" * (8 * 1024 * 1024)
    await client.enqueue_rollout(task)
    claimed = await client.dequeue_rollout()
    assert claimed is not None
    assert claimed.input == task


async def test_spans_are_sent_in_batches_by_bytes(
    client: LightningStoreClient, store: UnreliableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MAX_BATCH_BYTES", 5_000)
    rollout = await client.start_rollout("task")
    sizes = [2_000, 2_000, 2_000, 9_000, 100, 100]
    spans = [
        make_span(rollout, span_id=f"{index + 1:016x}", name=f"s{index}", attributes={"x": "x" * size})
        for index, size in enumerate(sizes)
    ]
    stored = await client.add_many_spans(spans)
    assert [span.name for span in stored] == [f"s{index}" for index in range(6)]
    assert [span.sequence_id for span in stored] == [1, 2, 3, 4, 5, 6]
    assert store.span_batches == [["s0", "s1"], ["s2"], ["s3"], ["s4", "s5"]]
