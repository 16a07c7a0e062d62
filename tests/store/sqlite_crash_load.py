"""Works on a SQLite store until it is killed, and says of each call that returned what it had done.

Run by `test_sqlite_crash.py`: `python sqlite_crash_load.py PATH DURABILITY SEED`. One line of JSON for each
acknowledged call, written in one piece as soon as the call has returned.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from itertools import count
from typing import Any

from lightning.store import SQLiteLightningStore
from lightning.types import PromptTemplate, Span

CLIENTS = 8


def acknowledge(kind: str, *what: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps([kind, *what]).encode() + b"\n")


async def work(store: SQLiteLightningStore, name: str, dice: random.Random) -> None:
    for number in count():
        rollout = await store.enqueue_rollout({"by": name, "number": number}, metadata={"step": 0})
        acknowledge("enqueued", rollout.rollout_id, rollout.input)
        claimed = await store.dequeue_rollout(worker_id=name)
        if claimed is None:  # somebody else was quicker
            continue
        key = (claimed.rollout_id, claimed.attempt.attempt_id)
        acknowledge("claimed", *key)
        for call in range(dice.randrange(4)):
            spans = [make_span(*key, call * 100 + index) for index in range(dice.choice([1, 4, 64]))]
            stored = await store.add_many_spans(spans)
            acknowledge("spans", *key, [[span.span_id, span.sequence_id] for span in stored])
        acknowledge("numbered", *key, await store.get_next_span_sequence_id(*key))
        await store.update_rollout(claimed.rollout_id, metadata={"step": number})
        acknowledge("updated", claimed.rollout_id, number)
        if dice.random() < 0.1:
            prompt = PromptTemplate(template="x" * dice.randrange(5000), engine="f-string")
            published = await store.add_resources({"prompt": prompt})
            acknowledge("published", published.resources_id, len(prompt.template))
        if dice.random() < 0.8:
            await store.update_attempt(*key, status="succeeded")
            acknowledge("finished", claimed.rollout_id)


def make_span(rollout_id: str, attempt_id: str, number: int) -> Span:
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=0,
        trace_id=f"{number + 1:032x}",
        span_id=f"{number + 1:016x}",
        name="step",
        attributes={"text": "x" * 500},
    )


async def main(path: str, durability: Any, seed: str) -> None:
    store = SQLiteLightningStore(path, durability=durability)
    await asyncio.gather(
        *(work(store, f"{seed}-{index}", random.Random(f"{seed}-{index}")) for index in range(CLIENTS))
    )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
