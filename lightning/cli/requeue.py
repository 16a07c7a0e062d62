"""`lightning requeue`: rollouts that should be tried again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.connecting import Server, to_a_server
from lightning.cli.outcomes import AsJson, Outcome, for_each, one_way_to_choose, tell
from lightning.cli.picture import DEFAULT_STUCK_AFTER_SECONDS, stuck_attempts

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient
    from lightning.types import AttemptedRollout


@to_a_server
def requeue_rollouts(
    server: Server,
    rollouts: Annotated[
        list[str] | None, typer.Argument(metavar="ROLLOUT", show_default=False, help="Ids, as ro-….")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All that have failed.")] = False,
    stuck: Annotated[
        bool, typer.Option("--stuck", help="All that [bold]lightning status[/] shows as stuck.")
    ] = False,
    stuck_after: Annotated[
        float,
        typer.Option(min=0.0, metavar="SECONDS", help="How long nothing is heard of those."),
    ] = DEFAULT_STUCK_AFTER_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Put rollouts at the tail of the queue for another attempt, whatever became of the ones before.

    What is under way is taken from its worker: its attempt is closed as unresponsive. Those in the queue stay there;
    cancelled ones stay cancelled.

    Examples:

      [bold]lightning requeue ro-4f1c…[/]
      [bold]lightning requeue --failed --json[/]
      [bold]lightning requeue --stuck --stuck-after 300 --connect host:4747[/]
    """
    one_way_to_choose(ROLLOUT=rollouts, failed=failed, stuck=stuck)

    async def main(client: LightningStoreClient) -> list[Outcome]:
        ids = rollouts or await _find(client, failed, stuck_after)
        return await for_each(ids, lambda rollout_id: _requeue(client, rollout_id))

    tell(server.ask(main), as_json, "there is nothing to requeue")


async def _find(client: LightningStoreClient, failed: bool, stuck_after: float) -> list[str]:
    if failed:
        return [rollout.rollout_id for rollout in await client.query_rollouts(status_in=["failed"])]
    return [attempt.rollout_id for attempt in await stuck_attempts(client, stuck_after)]


async def _requeue(client: LightningStoreClient, rollout_id: str) -> Outcome:
    from lightning.types import AttemptedRollout

    rollout = await client.get_rollout_by_id(rollout_id)
    if rollout is None:
        raise ValueError(f"unknown rollout {rollout_id!r}")
    if rollout.status in ("queuing", "requeuing"):
        return Outcome(rollout_id, False, "is in the queue already")
    if rollout.status in ("preparing", "running") and isinstance(rollout, AttemptedRollout):
        return await _take_away(client, rollout)
    await client.update_rollout(rollout_id, status="requeuing")
    return Outcome(rollout_id, True, f"requeued (was {rollout.status})")


async def _take_away(client: LightningStoreClient, rollout: AttemptedRollout) -> Outcome:
    """Close the attempt under way so that the rollout is retried by its own rules, which are first made to allow it.
    To queue it by hand would leave the attempt open; to close the attempt first could end the rollout, and everybody
    who waits for it would be told."""
    attempt, config = rollout.attempt, rollout.config
    allowing = config.model_copy(
        update={
            "max_attempts": max(config.max_attempts, attempt.sequence_id + 1),
            "retry_condition": list(dict.fromkeys([*config.retry_condition, "unresponsive"])),
        }
    )
    if allowing != config:
        await client.update_rollout(rollout.rollout_id, config=allowing)
    await client.update_attempt(rollout.rollout_id, attempt.attempt_id, status="unresponsive")
    now = await client.get_rollout_by_id(rollout.rollout_id)
    assert now is not None
    if now.status == "succeeded":  # it was quicker
        return Outcome(rollout.rollout_id, False, f"has ended meanwhile: {now.status}")
    return Outcome(
        rollout.rollout_id,
        True,
        f"requeued (was {rollout.status} at {attempt.worker_id or 'an unnamed worker'})",
    )
