"""What every way of executing a job agrees on: two bundles go in, and it is over when `execute` returns."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

from lightning.execution.events import ExecutionEvent
from lightning.store.contract import LightningStore

AlgorithmBundle = Callable[[LightningStore, ExecutionEvent], Awaitable[None]]
"""Called once, as `await algorithm(store, event)`; the job is over when it returns."""
RunnerBundle = Callable[[LightningStore, int, ExecutionEvent], Awaitable[None]]
"""Called in every runner, as `await runner(store, worker_id, event)` with `worker_id` counting from 0."""

WORKER_PREFIX_VARIABLE = "LIGHTNING_WORKER_PREFIX"
"""Environment variable: the first part of the names of this machine's workers."""
_DEFAULT_WORKER_PREFIX = "runner"


class ExecutionError(RuntimeError):
    """A part of the job ended in a way that it should not; the message names the part and says how."""


class ExecutionStrategy(ABC):
    """Says where the algorithm and the runners of a job live and how they reach the store.

    A strategy holds settings only: it can execute any number of jobs, one after the other.
    """

    alias: ClassVar[str]
    """What users call it."""

    @abstractmethod
    def execute(
        self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore | None = None
    ) -> None:
        """Run both until the algorithm returns, and return when nothing of the job is left.

        Args:
            algorithm: Hands out the work. When it returns, the runners are told to stop.
            runner: Does the work. Ends when told to, by `event` or by a command of the store.
            store: What the two meet at; stays the caller's to close. None: one is made for the job, and goes with it.

        Raises:
            Exception: Whatever the algorithm raised.
            ExecutionError: Something the job needs died.
            KeyboardInterrupt: By Ctrl-C, after everything was stopped in order.
            SystemExit: By SIGTERM, likewise, unless the program has a handler of its own, which is called then.
        """


def worker_name(index: int, prefix: str | None = None) -> str:
    """The id under which runner number `index` of this process's job is known to the store.

    Args:
        index: The `worker_id` that the runner bundle is given.
        prefix: None: what `LIGHTNING_WORKER_PREFIX` says, else "runner".
    """
    return f"{prefix or os.environ.get(WORKER_PREFIX_VARIABLE) or _DEFAULT_WORKER_PREFIX}-{index}"
