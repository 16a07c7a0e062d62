"""The command line. Each command has a file of its own and imports what it needs when it is called."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lightning.cli.cancel import cancel_rollouts
from lightning.cli.demo import run_demo
from lightning.cli.drain import drain_workers
from lightning.cli.errors import run_reporting
from lightning.cli.requeue import requeue_rollouts
from lightning.cli.runner import run_runners
from lightning.cli.status import show_status
from lightning.cli.store import serve_store
from lightning.cli.store_data import back_up_store, export_store, import_store
from lightning.cli.token import app as token_app

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lightning {version('agent-lightning-grpc')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def lightning(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train agents over gRPC: one store hands out work, runners on any machine do it, an algorithm learns from it.

    To see it at work: [bold]lightning demo[/]

    A training by hand takes three terminals, or three machines:

      [bold]lightning store[/]                         a store server
      [bold]lightning runner agents.py:agent -n 2[/]   two runners of your agent
      [bold]python train.py[/]                         your Trainer, at that store

    And to see how it goes: [bold]lightning status --watch[/]
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


store_app = typer.Typer(rich_markup_mode="rich")
store_app.callback(invoke_without_command=True)(serve_store)
store_app.command("backup")(back_up_store)
store_app.command("export")(export_store)
store_app.command("import")(import_store)
app.add_typer(store_app, name="store")
app.command("runner")(run_runners)
app.command("status")(show_status)
app.command("cancel")(cancel_rollouts)
app.command("requeue")(requeue_rollouts)
app.command("drain")(drain_workers)
app.command("demo")(run_demo)
app.add_typer(token_app, name="token")


def main() -> None:
    """What the console script `lightning` calls."""
    sys.exit(run_reporting(lambda: app(prog_name="lightning", standalone_mode=False)))
