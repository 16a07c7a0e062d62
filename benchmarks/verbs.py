"""How fast a backend is through the engine, in one process, or SQLite without this project.

python -m benchmarks.verbs memory|full:PATH|normal:PATH|mongodb://… N     the engine's verbs
python -m benchmarks.verbs alone:PATH N                                   SQLite alone

Prints calls, or spans, or rollouts per second by verb, as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence

import lightning
from benchmarks.echo import rate
from benchmarks.shared.store_bench import spans_of
from lightning.store.contract import LightningStore
from lightning.store.open import open_store

CALLERS = 64
SPAN_CALLERS = 8
SPANS_PER_CALL = 64
_CLAIMS_PER_ROUND = 8 * CALLERS
"""What was claimed is ended before more is, for no worker holds hundreds of attempts."""
_SPAN_BYTES = 1024
_SPANS_PER_ROLLOUT = 4
_ROW_BYTES = 300
"""About what a queued rollout has in the file."""


def open_backend(name: str) -> LightningStore:
    """The store of the first argument."""
    kind, _, path = name.partition(":")
    if kind in ("full", "normal"):
        return open_store(f"sqlite:{path}", durability=kind)
    return open_store(name)


async def rates(store: LightningStore, n: int) -> dict[str, float]:
    """Calls per second by verb, each verb by itself, many callers at once."""
    await store.add_resources({"p": lightning.PromptTemplate(template="hi {x}")})
    figures: dict[str, float] = {}
    claimed: list[lightning.AttemptedRollout] = []

    async def claim(i: int) -> None:
        rollout = await store.dequeue_rollout(worker_id=f"w{i % CALLERS}")
        assert rollout is not None
        claimed.append(rollout)

    async def update(i: int) -> None:
        key = (claimed[i].rollout_id, claimed[i].attempt.attempt_id)
        await store.update_attempt(*key, status="succeeded")

    async def start_to_finish(i: int) -> None:
        rollout = await store.start_rollout({"task": i}, worker_id=f"w{i % CALLERS}")
        key = (rollout.rollout_id, rollout.attempt.attempt_id)
        for span in spans_of(lightning, *key, range(1, 1 + _SPANS_PER_ROLLOUT), _SPAN_BYTES):
            await store.add_span(span)
        await store.update_attempt(*key, status="succeeded")

    figures["spans"] = await _span_rate(store, n)
    figures["enqueue"] = await rate(n, CALLERS, lambda i: store.enqueue_rollout({"task": i}, mode="train"))
    seconds = {"claim": 0.0, "update": 0.0}
    for first in range(0, n, _CLAIMS_PER_ROUND):
        count = min(_CLAIMS_PER_ROUND, n - first)
        claimed.clear()
        seconds["claim"] += count / await rate(count, CALLERS, claim)
        seconds["update"] += count / await rate(count, CALLERS, update)
    figures |= {verb: n / spent for verb, spent in seconds.items()}
    figures["start to finish"] = await rate(max(n // 8, CALLERS), CALLERS, start_to_finish)
    return figures


async def _span_rate(store: LightningStore, n: int) -> float:
    rollout = await store.start_rollout({})
    key = (rollout.rollout_id, rollout.attempt.attempt_id)
    calls = max(n // 8, SPAN_CALLERS)
    batches = [
        spans_of(lightning, *key, range(1 + i * SPANS_PER_CALL, 1 + (i + 1) * SPANS_PER_CALL), _SPAN_BYTES)
        for i in range(calls)
    ]
    gc.freeze()  # else the garbage collector's walks through what is only here to be sent are measured along
    return SPANS_PER_CALL * await rate(calls, SPAN_CALLERS, lambda i: store.add_many_spans(batches[i]))


def sqlite_alone(path: str, n: int) -> dict[str, float]:
    """Rows per second of the plainest tables, safe on disk after each transaction; as many rows in one as the engine
    has callers that can wait for it together."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        "CREATE TABLE rollouts (id TEXT PRIMARY KEY, status TEXT, body BLOB) WITHOUT ROWID;"
        "CREATE TABLE spans (attempt TEXT, number INTEGER, body BLOB, PRIMARY KEY (attempt, number)) WITHOUT ROWID;"
    )
    spans, body = bytes(_SPAN_BYTES), bytes(_ROW_BYTES)

    def per_second(rows: int, at_once: int, statement: str, row: Callable[[int], Sequence[object]]) -> float:
        started = time.perf_counter()
        for first in range(0, rows, at_once):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(statement, [row(i) for i in range(first, min(rows, first + at_once))])
            connection.execute("COMMIT")
        return rows / (time.perf_counter() - started)

    at_once = SPANS_PER_CALL * SPAN_CALLERS
    figures = {
        "spans": per_second(n * 8, at_once, "INSERT INTO spans VALUES (?, ?, ?)", lambda i: ("at", i, spans)),
        "enqueue": per_second(
            n, CALLERS, "INSERT INTO rollouts VALUES (?, ?, ?)", lambda i: (f"ro-{i:09}", "queuing", body)
        ),
    }
    change = "UPDATE rollouts SET status = ?, body = ? WHERE id = ?"
    figures["claim"] = per_second(n, CALLERS, change, lambda i: ("preparing", body, f"ro-{i:09}"))
    figures["update"] = per_second(n, CALLERS, change, lambda i: ("succeeded", body, f"ro-{i:09}"))
    connection.close()
    return figures


async def main(backend: str, n: int) -> dict[str, float]:
    """See the module."""
    if backend.startswith("alone:"):
        return sqlite_alone(backend.removeprefix("alone:"), n)
    store = open_backend(backend)
    try:
        return await rates(store, n)
    finally:
        await store.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], int(sys.argv[2])))))
