"""How `lightning status` looks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning.cli.picture import Picture, StuckAttempt, WorkerLine

_MOST_ROWS = 20
_STATUS_STYLES = {"busy": "green", "idle": "cyan", "ready": "cyan", "gone": "red"}


def render(picture: Picture) -> RenderableType:
    """The whole picture."""
    parts: list[RenderableType] = [_summary(picture)]
    if picture.worker_list:
        parts.append(_workers(picture.worker_list))
    parts.append(_stuck(picture))
    return Group(*parts)


def _summary(picture: Picture) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    up = "" if picture.uptime_seconds is None else f", up {duration(picture.uptime_seconds)}"
    table.add_row("store", f"{picture.server}{up}")
    oldest = picture.oldest_queued_seconds
    waits = "" if oldest is None else f", the oldest waits for {duration(oldest)}"
    table.add_row("queue", f"{picture.queued}{waits}")
    table.add_row("rollouts", _counts(picture.rollouts))
    table.add_row("attempts", _counts(picture.attempts))
    table.add_row("spans", f"{picture.spans}")
    table.add_row("rates", _rates(picture.rates))
    table.add_row("workers", _counts(picture.workers))
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"


def _rates(rates: Mapping[str, float | None]) -> str:
    shown = [
        f"{rates[key]:.1f} {name}/s"
        for key, name in (("rollouts_per_second", "rollouts"), ("spans_per_second", "spans"))
        if rates.get(key) is not None
    ]
    return ", ".join(shown) or "–"


def _workers(lines: list[WorkerLine]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("worker", "status", "works on", "heard", "cpu", "memory"):
        table.add_column(name, justify="right" if name in ("cpu", "memory") else "left", overflow="fold")
    for line in lines[:_MOST_ROWS]:
        heard = "never" if line.silent_seconds is None else f"{duration(line.silent_seconds)} ago"
        table.add_row(
            Text(line.worker_id),
            Text(line.status, style=_STATUS_STYLES[line.status]),
            line.rollout_id or "",
            heard,
            _percent(line.cpu_percent),
            _percent(line.memory_percent),
        )
    if len(lines) > _MOST_ROWS:
        table.add_row(f"… and {len(lines) - _MOST_ROWS} more")
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _stuck(picture: Picture) -> RenderableType:
    if not picture.stuck and not picture.nobody_claims:
        return Text("nothing is stuck", style="green")
    lines = [_stuck_line(attempt) for attempt in picture.stuck[:_MOST_ROWS]]
    if len(picture.stuck) > _MOST_ROWS:
        lines.append(Text(f"… and {len(picture.stuck) - _MOST_ROWS} more"))
    if picture.nobody_claims:
        lines.append(
            Text("the queue waits and no worker is there; start some with: lightning runner", style="red")
        )
    return Group(Text("stuck", style="bold red"), *lines)


def _stuck_line(attempt: StuckAttempt) -> Text:
    ending = "" if attempt.ends_by_itself else "; has no limit: lightning requeue"
    return Text(
        f"  {attempt.rollout_id} at {attempt.worker_id or 'an unnamed worker'}: nothing heard for "
        f"{duration(attempt.silent_seconds)}{ending}"
    )


def duration(seconds: float) -> str:
    """A length of time, as people say it."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
