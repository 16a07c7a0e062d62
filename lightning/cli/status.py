"""`lightning status`: the queue, the workers, how fast it goes, and what is stuck."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.connecting import Server, to_a_server
from lightning.cli.picture import DEFAULT_STUCK_AFTER_SECONDS, Picture, look

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient


@to_a_server
def show_status(
    server: Server,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Keep looking, until Ctrl-C; with --json a line for each look."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Between two looks. Rates are measured from one to the next, so that without --watch it takes as "
            "long; 0 then tells no rates.",
        ),
    ] = 1.0,
    stuck_after: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="How long nothing is heard of what is shown as being stuck."
        ),
    ] = DEFAULT_STUCK_AFTER_SECONDS,
) -> None:
    """Show what is going on at a store: queue, workers, rates, and work that is stuck.

    Examples:

      [bold]lightning status --connect host:4747[/]
      [bold]lightning status --watch[/]
      [bold]lightning status --json | jq .queued[/]
    """
    show = _show_json if as_json else _show_lines
    if watch and not as_json:
        _watch(server, max(interval, 0.1), stuck_after)
        return

    async def main(client: LightningStoreClient) -> None:
        async for picture in _looks(client, interval, stuck_after):
            if watch or interval == 0 or picture.rates:
                show(picture)
            if not watch and (interval == 0 or picture.rates):
                return

    server.ask(main)


async def _looks(client: LightningStoreClient, interval: float, stuck_after: float) -> AsyncIterator[Picture]:
    before: Picture | None = None
    while True:
        picture = await look(client, client.endpoint, stuck_after)
        if before is not None:
            picture = replace(picture, rates=picture.rates_since(before))
        yield picture
        before = picture
        await asyncio.sleep(interval)


def _show_json(picture: Picture) -> None:
    typer.echo(json.dumps(picture.as_json()))


def _show_lines(picture: Picture) -> None:
    from rich.console import Console

    from lightning.cli.status_view import render

    Console(highlight=False).print(render(picture))


def _watch(server: Server, interval: float, stuck_after: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from lightning.cli.status_view import render

    console = Console(highlight=False)

    async def main(client: LightningStoreClient) -> None:
        with Live(Text("looking …"), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            await _follow(
                client, interval, stuck_after, lambda picture: live.update(render(picture), refresh=True)
            )

    server.ask(main)


async def _follow(
    client: LightningStoreClient, interval: float, stuck_after: float, show: Callable[[Picture], None]
) -> None:
    async for picture in _looks(client, interval, stuck_after):
        show(picture)
