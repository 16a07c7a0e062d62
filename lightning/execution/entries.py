"""What child processes do: serve a store, be a runner, or be the algorithm."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Serving:
    """What a process reports that serves a store."""

    endpoint: str
    client_options: Mapping[str, Any]
    """What the owner's client needs to be let in."""
    metrics_url: str | None


async def serve_store(
    link: ParentLink,
    url: str,
    host: str,
    port: int,
    server_options: Mapping[str, Any],
    *,
    store_options: Mapping[str, Any] | None = None,
    grace: float | None = None,
    stop_workers: bool = True,
) -> None:
    """Serve the store at `url` until the parent says why to stop, or a signal tells to; reports that it is `Serving`.

    Args:
        link: To the parent.
        url: Names the store.
        host: The address to listen at.
        port: The port; 0 picks one.
        server_options: Of the `LightningStoreServer`.
        store_options: Of `open_store`.
        grace: How long calls in flight may take in the end; None: the default.
        stop_workers: Whether its end is that of the job, and workers are to stop.
    """
    from lightning.rpc.server import DEFAULT_GRACE_SECONDS, LightningStoreServer

    told = asyncio.ensure_future(link.receive())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.cancel)
    store = open_store(url, **(store_options or {}))
    try:
        server = LightningStoreServer(store, host, port, **server_options)
        await server.start()
        try:
            await server.statistics()  # opens the backend, so that what is wrong with it is said now
            link.report(Serving(server.endpoint, server.client_options, server.metrics_url))
            await asyncio.wait({told})
        finally:
            given = told.done() and not told.cancelled()
            reason = told.result() if given else "it was told to stop"
            seconds = DEFAULT_GRACE_SECONDS if grace is None else grace
            await server.stop(seconds, reason, stop_workers=stop_workers)
    finally:
        await store.close()
