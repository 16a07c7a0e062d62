"""Stores that only pass calls on: one generic function instead of every verb written out again."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from lightning.store.contract import LightningStore
from lightning.types import LightningStoreCapabilities

VERBS: tuple[str, ...] = tuple(
    name
    for name, member in vars(LightningStore).items()
    if inspect.iscoroutinefunction(member) and not name.startswith("_") and name != "close"
)
"""Every coroutine of the contract but `close`, whose meaning is each wrapper's own."""

STREAM_VERBS: tuple[str, ...] = tuple(
    name
    for name, member in vars(LightningStore).items()
    if inspect.isasyncgenfunction(member) and not name.startswith("_")
)
"""Every asynchronous generator of the contract."""


if TYPE_CHECKING:

    class _Forwarded(LightningStore):
        """For type checkers, which do not see what the loop below defines: every verb, with its signature."""

        statistics = LightningStore.statistics
        start_rollout = LightningStore.start_rollout
        enqueue_rollout = LightningStore.enqueue_rollout
        enqueue_many_rollouts = LightningStore.enqueue_many_rollouts
        dequeue_rollout = LightningStore.dequeue_rollout
        dequeue_many_rollouts = LightningStore.dequeue_many_rollouts
        start_attempt = LightningStore.start_attempt
        add_span = LightningStore.add_span
        add_many_spans = LightningStore.add_many_spans
        add_otel_span = LightningStore.add_otel_span
        get_next_span_sequence_id = LightningStore.get_next_span_sequence_id
        get_many_span_sequence_ids = LightningStore.get_many_span_sequence_ids
        query_rollouts = LightningStore.query_rollouts
        query_attempts = LightningStore.query_attempts
        query_spans = LightningStore.query_spans
        query_resources = LightningStore.query_resources
        query_workers = LightningStore.query_workers
        get_rollout_by_id = LightningStore.get_rollout_by_id
        get_latest_attempt = LightningStore.get_latest_attempt
        get_resources_by_id = LightningStore.get_resources_by_id
        get_latest_resources = LightningStore.get_latest_resources
        get_worker_by_id = LightningStore.get_worker_by_id
        wait_for_rollouts = LightningStore.wait_for_rollouts
        add_resources = LightningStore.add_resources
        update_resources = LightningStore.update_resources
        update_rollout = LightningStore.update_rollout
        update_attempt = LightningStore.update_attempt
        update_worker = LightningStore.update_worker
else:
    _Forwarded = LightningStore


def _forwarding(verb: str) -> Callable[..., Any]:
    async def forward(self: ForwardingStore, *args: Any, **kwargs: Any) -> Any:
        return await self._forward(verb, *args, **kwargs)

    return _as_in_contract(forward, verb)


def _forwarding_stream(verb: str) -> Callable[..., Any]:
    async def forward(self: ForwardingStore, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(self._forward_stream(verb, *args, **kwargs)) as items:
            async for item in items:
                yield item

    return _as_in_contract(forward, verb)


def _as_in_contract(forward: Callable[..., Any], verb: str) -> Callable[..., Any]:
    contract = getattr(LightningStore, verb)
    forward.__name__ = verb
    forward.__qualname__ = f"ForwardingStore.{verb}"
    forward.__doc__ = contract.__doc__
    forward.__signature__ = inspect.signature(contract)  # type: ignore[attr-defined]
    return forward


class ForwardingStore(_Forwarded):
    """A store whose verbs all go through `_forward` and `_forward_stream`, which a subclass defines."""

    @abstractmethod
    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Have somebody execute `verb` with these arguments."""

    @abstractmethod
    def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """The same for a verb that is an asynchronous generator."""

    for _verb in VERBS:
        locals()[_verb] = _forwarding(_verb)
    for _verb in STREAM_VERBS:
        locals()[_verb] = _forwarding_stream(_verb)
    del _verb


class ForeignStore(ForwardingStore):
    """Completes an object that has a store's methods but does not derive from `LightningStore`.

    Verbs that the object lacks are served by the contract's defaults where there are any.

    Args:
        store: Any object with the contract's methods.

    Raises:
        TypeError: A method without which it is no store is missing.
    """

    def __init__(self, store: Any) -> None:
        missing = [
            verb for verb in VERBS if verb in LightningStore.__abstractmethods__ and not hasattr(store, verb)
        ]
        if missing:
            raise TypeError(f"{type(store).__name__} is no LightningStore: it lacks {', '.join(missing)}")
        self._store = store

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        given: dict[str, bool] = getattr(self._store, "capabilities", {})
        return LightningStoreCapabilities(
            thread_safe=given.get("thread_safe", False),
            async_safe=given.get("async_safe", True),
            zero_copy=given.get("zero_copy", False),
            otlp_traces=given.get("otlp_traces", False),
        )

    async def close(self) -> None:
        close = getattr(self._store, "close", None)
        if close is not None:
            await close()

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self._store, verb, None)
        if own is None:
            return await getattr(LightningStore, verb)(self, *args, **kwargs)
        return await own(*args, **kwargs)

    def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        own = getattr(self._store, verb, None)
        if own is None:
            return getattr(LightningStore, verb)(self, *args, **kwargs)  # type: ignore[no-any-return]
        return own(*args, **kwargs)  # type: ignore[no-any-return]


def complete(store: Any) -> LightningStore:
    """`store` itself if it derives from `LightningStore`, else a `ForeignStore` around it."""
    return store if isinstance(store, LightningStore) else ForeignStore(store)
