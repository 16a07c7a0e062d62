"""Part `store`: the same calls against this project, the peer and the bare transport, by `shared/store_bench.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from lightningpb.v1 import store_service_pb2 as pb

import lightning
from benchmarks import peer
from benchmarks.figures import Check, Measurement, Row, Section, alternate
from benchmarks.servers import Served, echo, ours, peers, python, run
from benchmarks.shared.store_bench import spans_of
from lightning import codec
from lightning.rpc.handlers import UNARY_HANDLERS
from lightning.rpc.options import ServerLimits
from lightning.rpc.requests import reader
from lightning.rpc.service import SERVICE, StoreService

SCRIPT = "benchmarks/shared/store_bench.py"
_CALLERS = 16
_SPANS_PER_CALL = 64
_REQUEST_ID = "0" * 32

UNARY_ROWS = {
    "update_worker": "heartbeat (update_worker)",
    "enqueue": "enqueue",
    "dequeue": "dequeue",
    "dequeue_empty": "dequeue, empty queue",
    "add_span_1KB": "add_span, 1 KB",
}
OTHER_ROWS = {
    "add_many_spans_64x1KB": ("add_many_spans, 64 × 1 KB", "spans/s", 80.0),
    "query_spans": ("query_spans", "spans/s", 3.0),
    "rollout_flow_4spans": ("start, 4 spans, finish", "rollouts/s", 10.0),
}


async def measure(rounds: int, n: int, step: Callable[[str], None]) -> Section:
    """Run the script against each server, `rounds` times, each time on a fresh server."""
    environment = await peer.environment()
    sizes = await message_sizes()

    def by_script(
        server: Callable[[], AbstractAsyncContextManager[Served]], interpreter: str, module: str, scheme: str
    ) -> Measurement:
        async def measurement() -> dict[str, float]:
            async with server() as served:
                printed = await run(interpreter, SCRIPT, module, f"{scheme}{served.address}", "--n", str(n))
            return {name: figures["per_s"] for name, figures in json.loads(printed).items()}

        return measurement

    async def bare() -> dict[str, float]:
        async with echo() as served:
            arguments = (served.address, json.dumps(sizes), str(n), str(_CALLERS))
            rates: dict[str, float] = json.loads(await run(*python("-m", "benchmarks.echo", *arguments)))
        rates["add_many_spans_64x1KB"] *= _SPANS_PER_CALL
        return rates

    medians = await alternate(
        rounds,
        {
            "ours, memory": by_script(ours, sys.executable, "lightning", ""),
            "bare": bare,
            "ours, SQLite": by_script(lambda: ours("sqlite"), sys.executable, "lightning", ""),
            "peer": by_script(
                lambda: peers(environment), str(environment / "bin" / "python"), "agentlightning", "http://"
            ),
        },
        step,
    )
    return Section(
        "store",
        "Calls to the store",
        f"`{SCRIPT}` with {_CALLERS} callers in one client process, unchanged, against a fresh server each time; "
        f"median of {rounds} rounds. *Bare* is a `grpc.aio` echo that takes and returns as many bytes as this "
        "project's messages have, with nothing else done. *SQLite* acknowledges after the transaction is on disk.",
        _rows(medians),
    )


def _rows(medians: dict[str, dict[str, float]]) -> list[Row]:
    def figures(key: str) -> dict[str, float]:
        return {side: of_side[key] for side, of_side in medians.items() if key in of_side}

    rows = []
    for key, name in UNARY_ROWS.items():
        seen = figures(key)
        our = seen["ours, memory"]
        checks = [
            Check("ours / peer", our / seen["peer"], 5.0),
            Check("ours / bare", our / seen["bare"], 0.6),
        ]
        rows.append(Row(name, "calls/s", seen, checks))
    for key, (name, unit, bound) in OTHER_ROWS.items():
        seen = figures(key)
        checks = [Check("ours / peer", seen["ours, memory"] / seen["peer"], bound)]
        if key == "add_many_spans_64x1KB":
            checks.append(Check("SQLite / peer's memory", seen["ours, SQLite"] / seen["peer"], 25.0))
        rows.append(Row(name, unit, seen, checks))
    return rows


async def message_sizes() -> dict[str, tuple[int, int]]:
    """The sizes of the requests and answers of the script's calls, as the server really makes them."""
    store = lightning.InMemoryLightningStore()
    service = StoreService(store, "InMemoryLightningStore", ServerLimits())
    sizes: dict[str, tuple[int, int]] = {}

    async def call(name: str, method: str, request: Any) -> None:
        data = request.SerializeToString()
        answer = await UNARY_HANDLERS[method](service, reader(SERVICE, method)(data))
        sizes[name] = (len(data), answer.ByteSize())

    await store.add_resources({"p": lightning.PromptTemplate(template="hi {x}")})
    heartbeat = pb.UpdateWorkerRequest(
        request_id=_REQUEST_ID, worker_id="w10", heartbeat_stats_json=b'{"cpu":1000}'
    )
    await call("update_worker", "UpdateWorker", heartbeat)
    spec = codec.spec_to_proto(lightning.EnqueueRolloutRequest(input={"task": 1000}, mode="train"))
    await call("enqueue", "EnqueueRollouts", pb.EnqueueRolloutsRequest(request_id=_REQUEST_ID, specs=[spec]))
    claim = pb.DequeueRolloutsRequest(request_id=_REQUEST_ID, limit=1, worker_id="w10")
    await call("dequeue", "DequeueRollouts", claim)
    await call("dequeue_empty", "DequeueRollouts", claim)
    started = await store.start_rollout(input={})
    ids = (started.rollout_id, started.attempt.attempt_id)
    spans = [codec.span_to_proto(span) for span in spans_of(lightning, *ids, range(1001, 1066), 1024)]
    await call("add_span_1KB", "AddSpans", pb.AddSpansRequest(request_id=_REQUEST_ID, spans=spans[:1]))
    await call(
        "add_many_spans_64x1KB", "AddSpans", pb.AddSpansRequest(request_id=_REQUEST_ID, spans=spans[1:])
    )
    await store.close()
    return sizes
