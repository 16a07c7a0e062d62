"""`lightning runner`: a fleet of runner processes on this machine."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.connecting import Server, to_a_server
from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient

_PATIENCE_SECONDS = 1.0
"""How long to wait for a server before saying that one waits for it."""


@to_a_server
def run_runners(
    server: Server,
    agent: Annotated[
        str,
        typer.Argument(
            metavar="AGENT",
            show_default=False,
            help="The agent: [bold]package.module:name[/] or [bold]folder/file.py:name[/].",
        ),
    ],
    n_runners: Annotated[int, typer.Option("-n", "--n", min=1, help="How many processes.")] = 1,
    concurrency: Annotated[
        int, typer.Option(min=1, help="How many rollouts each process executes at a time.")
    ] = 1,
    worker_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="The workers are called NAME-0, NAME-1, … By default a name that is theirs alone.",
        ),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            show_default=False,
            help="Give up if the server is not there after so long. By default runners wait for it.",
        ),
    ] = None,
) -> None:
    """Run runners: processes that take work from a store server and have an agent do it.

    They can be started before the server. They end when the job does, or by Ctrl-C. On SIGTERM they finish first what
    they are doing.

    Examples:

      [bold]lightning runner agents.py:agent[/]
      [bold]lightning runner mypackage.agents:agent --connect host:4747 -n 8[/]
      [bold]lightning runner agents.py:agent --connect grpcs://host:4747 --tls-ca ca.pem --token-file token[/]
    """
    from lightning.execution import ClientServerExecutionStrategy
    from lightning.execution.base import WORKER_PREFIX_VARIABLE
    from lightning.rpc import RemoteStoreError
    from lightning.rpc.address import parse_endpoint
    from lightning.training import Trainer

    client = server.client()
    endpoint = parse_endpoint(server.address)
    sys.path.insert(
        0, str(Path.cwd())
    )  # as `python -m` does, so that modules of the current folder are found
    if worker_prefix:
        os.environ[WORKER_PREFIX_VARIABLE] = worker_prefix
    with reporting(ValueError, TypeError, ImportError, exit_code=EXIT_USAGE):
        strategy = ClientServerExecutionStrategy(
            role="runner",
            server_host=f"grpcs://{endpoint.host}" if endpoint.secure else endpoint.host,
            server_port=endpoint.port,
            n_runners=n_runners,
            client_options=dict(server.options),
        )
        trainer = Trainer(agent=agent, strategy=strategy, runner={"concurrency": concurrency})
    asyncio.run(_wait_for_server(client, wait))
    typer.echo(
        f"{n_runners} runner{'s' if n_runners > 1 else ''} of {agent} at {client.endpoint}, Ctrl-C ends them"
    )
    with reporting(RuntimeError, ConnectionError, RemoteStoreError):
        trainer.run()
    typer.echo("the runners have ended, as they were told to")


async def _wait_for_server(client: LightningStoreClient, limit: float | None) -> None:
    """Return when the server answers and lets us in. Raises `CommandError` after `limit` seconds (None: never)."""
    from lightning.rpc import LimitExceededError, PermissionDenied, Unauthenticated, UntrustedServerError

    address = client.endpoint
    try:
        waiting = asyncio.ensure_future(client.wait_until_ready(limit))
        await asyncio.wait({waiting}, timeout=_PATIENCE_SECONDS)
        if not waiting.done():
            typer.echo(f"waiting for a store server at {address} …", err=True)
        with reporting(LimitExceededError, Unauthenticated, PermissionDenied, UntrustedServerError):
            await waiting
            await client.dequeue_many_rollouts(limit=0)  # claims nothing, but only who may claim may do so
    except (ConnectionError, TimeoutError, asyncio.TimeoutError):
        raise CommandError(
            f"there is no store server at {address} (waited {limit:g} s); start one with: lightning store"
        ) from None
    finally:
        await client.close()
