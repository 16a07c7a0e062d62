"""`lightning drain`: workers that should finish what they do and go."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.connecting import Server, to_a_server
from lightning.cli.outcomes import AsJson, Outcome, for_each, one_way_to_choose, tell

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient


@to_a_server
def drain_workers(
    server: Server,
    workers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKER",
            show_default=False,
            help="Ids as [bold]lightning status[/] shows them, or patterns like 'host-a-*'.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All workers.")] = False,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="For the workers' logs.")
    ] = "by lightning drain",
    as_json: AsJson = False,
) -> None:
    """Have workers finish the rollouts in hand, claim no more, and end.

    Those that are not there hear nothing of it. What waits in the queue stays there for others.

    Examples:

      [bold]lightning drain trainer-7-0[/]
      [bold]lightning drain 'gpu-host-3-*' --reason maintenance[/]
      [bold]lightning drain --all --connect host:4747[/]
    """
    one_way_to_choose(WORKER=workers, all=everything)

    async def main(client: LightningStoreClient) -> list[Outcome]:
        known = [worker.worker_id for worker in await client.query_workers(sort_by="worker_id")]
        if everything:
            outcomes = await for_each(known, lambda worker_id: _drain(client, worker_id, reason))
            return [outcome for outcome in outcomes if not outcome.failed]  # of those who are long gone
        chosen, unmatched = _match(workers or [], known)
        missing = [Outcome(name, False, f"unknown worker {name!r}", failed=True) for name in unmatched]
        return [*await for_each(chosen, lambda worker_id: _drain(client, worker_id, reason)), *missing]

    tell(server.ask(main), as_json, "no worker is there")


def _match(wanted: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    """The workers that are meant, and what means none."""
    matches = {each: [name for name in known if name == each or fnmatchcase(name, each)] for each in wanted}
    return [name for names in matches.values() for name in names], [
        each for each, names in matches.items() if not names
    ]


async def _drain(client: LightningStoreClient, worker_id: str, reason: str) -> Outcome:
    from lightning.types import Drain

    processes = await client.send_command(Drain(reason=reason), worker_id)
    if not processes:
        return Outcome(worker_id, False, f"worker {worker_id!r} is not there to be told", failed=True)
    return Outcome(worker_id, True, "drains" if processes == 1 else f"{processes} processes drain")
