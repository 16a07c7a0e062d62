"""`lightning cancel`: rollouts that are no longer wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.connecting import Server, to_a_server
from lightning.cli.outcomes import AsJson, Outcome, for_each, one_way_to_choose, tell

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient


@to_a_server
def cancel_rollouts(
    server: Server,
    rollouts: Annotated[
        list[str] | None, typer.Argument(metavar="ROLLOUT", show_default=False, help="Ids, as ro-….")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that have not ended, in the queue or under way.")
    ] = False,
    queued: Annotated[bool, typer.Option("--queued", help="All in the queue.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cancel rollouts: they leave the queue, and agents that work on them are interrupted in their code.

    Those that have ended already stay as they are.

    Examples:

      [bold]lightning cancel ro-4f1c…[/]
      [bold]lightning cancel --queued --connect host:4747[/]
      [bold]lightning cancel --all --json[/]
    """
    one_way_to_choose(ROLLOUT=rollouts, all=everything, queued=queued)

    async def main(client: LightningStoreClient) -> list[Outcome]:
        ids = rollouts or await _find(client, queued)
        return await for_each(ids, lambda rollout_id: _cancel(client, rollout_id))

    tell(server.ask(main), as_json, "there is nothing to cancel")


async def _find(client: LightningStoreClient, queued: bool) -> list[str]:
    found = await client.query_rollouts(
        status_in=["queuing", "requeuing"] if queued else ["queuing", "requeuing", "preparing", "running"]
    )
    return [rollout.rollout_id for rollout in found]


async def _cancel(client: LightningStoreClient, rollout_id: str) -> Outcome:
    from lightning.store.contract import TERMINAL_ROLLOUT_STATUSES

    rollout = await client.get_rollout_by_id(rollout_id)
    if rollout is None:
        raise ValueError(f"unknown rollout {rollout_id!r}")
    if rollout.status in TERMINAL_ROLLOUT_STATUSES:
        return Outcome(rollout_id, False, f"has ended already: {rollout.status}")
    await client.update_rollout(rollout_id, status="cancelled")
    return Outcome(rollout_id, True, f"cancelled (was {rollout.status})")
