"""The tracer: records what an agent does with the plain OpenTelemetry API as spans of the attempt being executed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lightning.store.contract import LightningStore
from lightning.tracing import provider
from lightning.tracing.sink import MAX_BUFFERED_BYTES, MAX_BUFFERED_SPANS, AttemptTrace, RunElsewhere


class OtelTracer:
    """Routes spans made through OpenTelemetry's global API to the attempt in whose context they are made.

    Attempts that run at the same time in one process stay apart, see `lightning.tracing.provider`. The first trace
    installs a global `TracerProvider` of ours, unless the program has set one of the SDK already, which is then
    listened to. A tracer holds no state and can be shared and pickled.

    Args:
        max_buffered_spans: How many spans of an attempt may wait for the store before further ones are dropped.
        max_buffered_bytes: The same as an amount of memory.

    Raises:
        ValueError: A bound is not positive.
    """

    def __init__(
        self, *, max_buffered_spans: int = MAX_BUFFERED_SPANS, max_buffered_bytes: int = MAX_BUFFERED_BYTES
    ) -> None:
        for name, bound in (
            ("max_buffered_spans", max_buffered_spans),
            ("max_buffered_bytes", max_buffered_bytes),
        ):
            if bound < 1:
                raise ValueError(f"{name} must be at least 1, not {bound!r}")
        self._max_buffered_spans = max_buffered_spans
        self._max_buffered_bytes = max_buffered_bytes

    @asynccontextmanager
    async def trace(
        self,
        store: LightningStore,
        rollout_id: str,
        attempt_id: str,
        *,
        run: RunElsewhere | None = None,
        close_timeout: float | None = None,
    ) -> AsyncIterator[AttemptTrace]:
        """Record the spans made within the block, and in tasks and threads that are started in it with its context.

        They are sent while the block runs; when it is left, every one is stored or counted as lost.

        Args:
            store: Where they go.
            rollout_id: The rollout.
            attempt_id: The attempt.
            run: Runs the sending on an event loop of the caller's choice, for a block that may hold up its own;
                the store must be thread-safe then.
            close_timeout: How many seconds to wait at the end for a store that is out of reach; None: as long as it
                takes.
        """
        provider.install()
        trace = AttemptTrace(
            store,
            rollout_id,
            attempt_id,
            run=run,
            max_buffered_spans=self._max_buffered_spans,
            max_buffered_bytes=self._max_buffered_bytes,
        )
        await trace.start()
        tokens = provider.enter(trace)
        try:
            yield trace
        finally:
            provider.leave(trace, tokens)
            await trace.close(close_timeout)
