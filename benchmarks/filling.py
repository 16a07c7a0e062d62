"""Stores spans of 1 KB through a client, of this project or of the peer, and then waits for its input to end.

filling.py MODULE URL COUNT     prints a line when COUNT spans are stored, COUNT a multiple of 640
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import Any

_SPANS_PER_CALL = 64
_ROLLOUTS = 10


async def fill(module: Any, url: str, count: int) -> None:
    """Store spans of some rollouts, as many of each."""
    spans_of = importlib.import_module("shared.store_bench").spans_of  # beside this script, whoever runs it
    client = module.LightningStoreClient(url)
    numbers = range(1, count // _ROLLOUTS + 1)
    for _ in range(_ROLLOUTS):
        rollout = await client.start_rollout(input={})
        ids = (rollout.rollout_id, rollout.attempt.attempt_id)
        for first in range(0, len(numbers), _SPANS_PER_CALL):
            await client.add_many_spans(
                spans_of(module, *ids, numbers[first : first + _SPANS_PER_CALL], 1024)
            )
    await client.close()


if __name__ == "__main__":
    asyncio.run(fill(importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
