"""Doing something with many rollouts or workers, and saying what came of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError

_AT_ONCE = 32

AsJson = Annotated[bool, typer.Option("--json", help="Print what came of each as JSON.")]


@dataclass(frozen=True)
class Outcome:
    """What came of one."""

    id: str
    done: bool
    """Whether something was changed."""
    result: str
    """In words: what it is now, or why nothing was done."""
    failed: bool = False
    """Whether that is a failure, and not just that there was nothing to do."""


async def for_each(ids: Sequence[str], act: Callable[[str], Awaitable[Outcome]]) -> list[Outcome]:
    """Act on each, some at a time. What is refused (`ValueError`) is the outcome of that one alone; any other error
    ends it all."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(each: str) -> Outcome:
        async with slots:
            try:
                return await act(each)
            except ValueError as error:
                return Outcome(each, False, str(error), failed=True)

    return await asyncio.gather(*map(one, dict.fromkeys(ids)))


def tell(outcomes: Sequence[Outcome], as_json: bool, nothing: str) -> None:
    """Print them.

    Args:
        outcomes: What came of each.
        as_json: A list, in place of a line for each.
        nothing: What to say if there are none.

    Raises:
        CommandError: Some failed.
    """
    failed = [outcome for outcome in outcomes if outcome.failed]
    if as_json:
        typer.echo(json.dumps([asdict(outcome) for outcome in outcomes]))
    elif not outcomes:
        typer.echo(nothing)
    else:
        for outcome in outcomes:
            if not outcome.failed:
                typer.echo(f"{outcome.id}: {outcome.result}")
    if failed:
        more = "" if len(failed) == 1 else f" (and {len(failed) - 1} more of {len(outcomes)})"
        raise CommandError(f"{failed[0].result}{more}")


def one_way_to_choose(**given: object) -> None:
    """Raises `CommandError` unless exactly one of these ways to say which is used; each is named by its keyword."""
    used = [name for name, value in given.items() if value]
    names = [_spelled(name) for name in given]
    if len(used) != 1:
        problem = "say which" if not used else f"{' and '.join(map(_spelled, used))} exclude each other"
        raise CommandError(f"{problem}: give {' or '.join(names)}", EXIT_USAGE)


def _spelled(name: str) -> str:
    return name if name.isupper() else f"--{name}"
