"""What child processes do: serve a store, be a runner, or be the algorithm."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Mapping
from typing import Any

from lightning.execution.base import AlgorithmBundle, RunnerBundle
from lightning.execution.child import ParentLink
from lightning.execution.commands import CommandedStore
from lightning.execution.events import ExecutionEvent
from lightning.store.contract import LightningStore
from lightning.store.open import open_store


async def run_runner(link: ParentLink, runner: RunnerBundle, event: ExecutionEvent) -> None:
    """Be a runner. Which one, and with what store, the parent says once the store is there; and later what to do."""
    index, pickled_store = await link.receive()
    store = CommandedStore(pickle.loads(pickled_store))
    obeying = asyncio.create_task(_pass_on(link, store))
    try:
        await runner(store, index, event)
    finally:
        obeying.cancel()
        await store.close()


async def _pass_on(link: ParentLink, store: CommandedStore) -> None:
    while True:
        store.tell(await link.receive())


async def run_algorithm(link: ParentLink, algorithm: AlgorithmBundle, event: ExecutionEvent) -> None:
    """Be the algorithm, with the store that the parent names once it is there."""
    store: LightningStore = pickle.loads(await link.receive())
    try:
        await algorithm(store, event)
    finally:
        await store.close()


async def serve_store(
    link: ParentLink, url: str, host: str, port: int, server_options: Mapping[str, Any]
) -> None:
    """Serve the store at `url` until the parent says why to stop, or a signal tells to; reports the endpoint, and what
    a client needs to be let in."""
    from lightning.rpc.server import LightningStoreServer

    told = asyncio.ensure_future(link.receive())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    store = open_store(url)
    try:
        server = LightningStoreServer(store, host, port, **server_options)
        await server.start()
        try:
            await server.statistics()  # opens the backend, so that what is wrong with it is said now
            link.report((server.endpoint, server.client_options))
            await asyncio.wait({told})
        finally:
            reason = "it was told to stop" if told.cancelled() else told.result()
            await server.stop(reason=reason, stop_workers=True)
    finally:
        await store.close()
