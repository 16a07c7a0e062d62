"""How `lightning store` serves: in this process, or by several at one port."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from lightning.execution.child import ParentLink
    from lightning.execution.server_fleet import ServerFleet
    from lightning.rpc import LightningStoreServer

_LAST_PORT = 65535
_END_MARGIN_SECONDS = 10.0
"""How long a process may take to end beside what its calls under way may."""
_ENDING = "ending: new calls are refused, those under way are finished"


# --- In this process -------------------------------------------------------------------------------------------


async def serve(server: LightningStoreServer, backend: str, host: str, grace: float) -> None:
    """Serve until told to end."""
    with _asked_to_end() as asked:
        try:
            await server.start()
            await server.statistics()  # opens the backend, so that what is wrong with it is said now
            typer.echo(_welcome(backend, host, server.endpoint, [server.metrics_url]))
            await asked.wait()
            typer.echo(_ENDING)
        finally:
            _heed_no_more()
            await server.close(grace, "the server was told to end")


# --- By several ------------------------------------------------------------------------------------------------


def check_workers(workers: int, backend: str, metrics_port: int | None) -> None:
    """Raise `CommandError` if so many processes cannot serve such a store; `ValueError` if it is none."""
    from lightning.store.open import is_shared

    if workers > 1 and not is_shared(backend):
        raise CommandError(
            f"--workers {workers} needs a store that several processes can work on, mongodb://…; "
            f"{backend.partition(':')[0]} is for one",
            EXIT_USAGE,
        )
    if metrics_port and metrics_port + workers - 1 > _LAST_PORT:
        raise CommandError(
            f"{workers} processes show metrics at {workers} ports from {metrics_port} on, and there are none above "
            f"{_LAST_PORT}",
            EXIT_USAGE,
        )


def serve_by_many(
    workers: int,
    backend: str,
    store_options: dict[str, Any],
    host: str,
    port: int,
    options: dict[str, Any],
    grace: float,
) -> None:
    """Serve by `workers` processes until told to end. Raises `CommandError` if that cannot be, or no longer."""
    from lightning.execution.base import ExecutionError
    from lightning.execution.server_fleet import ServerFleet
    from lightning.rpc.address import PortReservation, check_listener
    from lightning.store.persistence.abc import BackendError

    with reporting(OSError, ImportError, BackendError, ExecutionError):
        reservation = PortReservation(check_listener(host, port))
        try:
            serve_one = functools.partial(
                _serve_one,
                url=backend,
                host=host,
                port=reservation.port,
                store_options=store_options,
                grace=grace,
                stop_workers=False,
            )
            entries = [
                functools.partial(serve_one, server_options=_options_of(number, options))
                for number in range(workers)
            ]
            asyncio.run(_serve_all(ServerFleet(entries, grace + _END_MARGIN_SECONDS), backend, host))
        finally:
            reservation.close()


def _options_of(number: int, options: dict[str, Any]) -> dict[str, Any]:
    metrics_port = options["metrics_port"]
    if metrics_port:
        metrics_port += number
    return {**options, "metrics_port": metrics_port, "share_port": True}


async def _serve_one(link: ParentLink, *, server_options: dict[str, Any], **settings: Any) -> None:
    """What each process does."""
    from lightning.execution.entries import serve_store

    if server_options["access_log"]:
        show_access_log()
    await serve_store(link, server_options=server_options, **settings)


async def _serve_all(fleet: ServerFleet, backend: str, host: str) -> None:
    with _asked_to_end() as asked:
        running = asyncio.create_task(_keep_serving(fleet, backend, host))
        asking = asyncio.create_task(asked.wait())
        try:
            await asyncio.wait({running, asking}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
            typer.echo(_ENDING)
        finally:
            _heed_no_more()
            for task in (running, asking):
                task.cancel()
            await asyncio.gather(running, asking, return_exceptions=True)
            await fleet.stop()


async def _keep_serving(fleet: ServerFleet, backend: str, host: str) -> None:
    serving = await fleet.start()
    typer.echo(_welcome(backend, host, serving[0].endpoint, [each.metrics_url for each in serving]))
    await fleet.run()


# --- Both ways -------------------------------------------------------------------------------------------------


def show_access_log() -> None:
    """Let the access log go to stderr."""
    from lightning.rpc.access_log import ACCESS_LOGGER

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger(ACCESS_LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@contextmanager
def _asked_to_end() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    try:
        yield asked
    finally:
        _heed_no_more()


def _heed_no_more() -> None:
    """Asked again, this process ends at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().remove_signal_handler(number)


def _welcome(backend: str, host: str, endpoint: str, metrics_urls: Sequence[str | None]) -> str:
    from lightning.rpc.address import is_loopback, parse_endpoint
    from lightning.store.open import full_url

    lines = [
        f"store ({full_url(backend)}) at {endpoint}, Ctrl-C ends it",
        f"  runners:   lightning runner FILE.py:AGENT --connect {endpoint}",
        f'  trainers:  Trainer(store="{endpoint}", strategy={{"type": "cs", "role": "algorithm"}}, …)',
    ]
    if len(metrics_urls) > 1:
        lines.append(f"  processes: {len(metrics_urls)}")
    lines += [f"  metrics:   {url}" for url in metrics_urls if url is not None]
    if not is_loopback(host):
        scheme = "grpcs://" if endpoint.startswith("grpcs://") else ""
        port = parse_endpoint(endpoint).port
        lines.append(f"  elsewhere: the same with {scheme}{socket.gethostname()}:{port}")
    return "\n".join(lines)
