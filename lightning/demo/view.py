"""What a person sees of a training: a live view on a terminal, one line per step elsewhere; at the end, the curve."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lightning.demo.plan import TrainingPlan
from lightning.store.contract import LightningStore
from lightning.types import LightningStoreStatistics, Worker

if TYPE_CHECKING:
    from lightning.demo.algorithm import TrainingResult
    from lightning.demo.policy import StepStats

_REFRESH_SECONDS = 0.5
_RATE_WINDOW_SECONDS = 5.0
_BEST_RETURN = 500.0
_BARS = "▁▂▃▄▅▆▇█"


class TrainingView:
    """Watches a training on behalf of a person. A `TrainingObserver`; use it as a context manager around the training.

    Args:
        console: Where to show it.
        title: What is being shown, in a few words.
        hint: Shown as long as there are no workers; None for nothing.
    """

    def __init__(self, console: Console, title: str, hint: str | None = None) -> None:
        self._console = console
        self._title = title
        self._hint = hint
        self._progress = Progress(
            TextColumn("iteration"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("iteration", total=None)
        self._rates = _Rates()
        self._statistics: LightningStoreStatistics | None = None
        self._workers: Sequence[Worker] = ()
        self._returns: list[float] = []
        self._validations: list[tuple[int, float]] = []
        self._poll: asyncio.Task[None] | None = None
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=4,
            transient=True,
            redirect_stderr=False,
        )

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._poll is not None and not self._poll.get_loop().is_closed():
            self._poll.cancel()
        self._live.stop()

    # --- the observer ---

    def started(self, store: LightningStore, plan: TrainingPlan) -> None:
        """See `TrainingObserver`."""
        self._progress.update(self._task, total=plan.max_iterations)
        if self._hint is not None:
            self._say(self._hint)
        self._poll = asyncio.get_running_loop().create_task(self._follow(store))

    def validated(self, iteration: int, mean_return: float) -> None:
        """See `TrainingObserver`."""
        self._validations.append((iteration, mean_return))
        self._say(f"iteration {iteration:2d}: validation return {mean_return:5.1f}")

    def learned(self, iteration: int, stats: StepStats) -> None:
        """See `TrainingObserver`."""
        self._returns.append(stats.mean_return)
        self._progress.update(self._task, completed=iteration)
        self._say(
            f"iteration {iteration:2d}: training return {stats.mean_return:5.1f} over {stats.episodes} episodes, "
            f"entropy {stats.entropy:.2f}"
        )

    # --- the picture ---

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)

    async def _follow(self, store: LightningStore) -> None:
        """Ask the store twice a second what there is to show."""
        while True:
            try:
                statistics = await store.statistics()
                self._workers = await store.query_workers(sort_by="worker_id")
            except ConnectionError:
                pass  # the training itself reports a store that stays away; a picture may be late
            else:
                self._statistics = statistics
                self._rates.add(statistics)
            await asyncio.sleep(_REFRESH_SECONDS)

    def _render(self) -> RenderableType:
        return Panel(
            Group(self._progress, self._returns_line(), self._rates_line(), Text(), self._workers_part()),
            title=self._title,
            padding=(1, 2),
        )

    def _returns_line(self) -> Text:
        line = Text("return    ")
        line.append(sparkline(self._returns[-40:]) or "…", style="cyan")
        if self._returns:
            line.append(f"  {self._returns[-1]:.0f}")
        if self._validations:
            line.append(
                f"   validation {self._validations[-1][1]:.0f} of {_BEST_RETURN:.0f}", style="bold green"
            )
        return line

    def _rates_line(self) -> Text:
        statistics = self._statistics or {}
        by_status = statistics.get("rollouts_by_status", {})
        running = by_status.get("running", 0) + by_status.get("preparing", 0)
        queued = by_status.get("queuing", 0) + by_status.get("requeuing", 0)
        return Text(
            f"rollouts  {by_status.get('succeeded', 0):5d} done  {running:3d} running  {queued:3d} queued"
            f"  {self._rates.rollouts:5.1f}/s\n"  # 54 characters, which fit into a terminal of 60
            f"spans     {statistics.get('total_spans', 0):5d} stored{'':23s}{self._rates.spans:7.1f}/s"
        )

    def _workers_part(self) -> RenderableType:
        if not self._workers and self._hint is not None:
            return Text(self._hint, style="yellow")
        return self._worker_table()

    def _worker_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("worker", "status", "rollout", "heard", "cpu", "memory"):
            table.add_column(heading, justify="right" if heading in ("heard", "cpu", "memory") else "left")
        now = time.time()
        for worker in self._workers:
            stats = worker.heartbeat_stats or {}
            heard = [t for t in (worker.last_heartbeat_time, worker.last_dequeue_time) if t is not None]
            style = {"busy": "green", "idle": "yellow"}.get(worker.status, "dim")
            table.add_row(
                worker.worker_id,
                Text(worker.status, style=style),
                (worker.current_rollout_id or "")[:15],
                f"{max(0.0, now - max(heard)):.0f} s ago" if heard else "never",
                _usage(stats, "cpu"),
                _usage(stats, "memory"),
            )
        return table


class _Rates:
    """Rollouts and spans per second over the last few seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()

    def add(self, statistics: LightningStoreStatistics) -> None:
        done = statistics.get("rollouts_by_status", {}).get("succeeded", 0)
        self._samples.append((time.monotonic(), done, statistics.get("total_spans", 0)))
        while self._samples[-1][0] - self._samples[0][0] > _RATE_WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def rollouts(self) -> float:
        return self._per_second(1)

    @property
    def spans(self) -> float:
        return self._per_second(2)

    def _per_second(self, column: int) -> float:
        if len(self._samples) < 2:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return float(last[column] - first[column]) / (last[0] - first[0])


def sparkline(values: Sequence[float], best: float = _BEST_RETURN) -> str:
    """The values as a line of bars, from 0 to `best`."""
    return "".join(_BARS[min(len(_BARS) - 1, int(value / best * len(_BARS)))] for value in values)


def save_curve(result: TrainingResult, path: Path) -> None:
    """Draw the training and validation returns over the iterations as a PNG.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and no window is wanted
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(len(result.training_returns)), result.training_returns, label="training (16 episodes)")
    iterations, means = zip(*result.validations.curve, strict=True)
    axes.plot(iterations, means, "o-", label="validation (20 episodes, greedy)")
    axes.axhline(_BEST_RETURN, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="iteration of the policy", ylabel="mean return", title="CartPole-v1", ylim=(0, None))
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _usage(stats: dict[str, Any], part: str) -> str:
    """What `system_snapshot` measured; nothing where a worker of another make sends something else."""
    measured = stats.get(part)
    percent = measured.get("usage_percent") if isinstance(measured, dict) else None
    return f"{percent:.0f} %" if isinstance(percent, (int, float)) else ""
