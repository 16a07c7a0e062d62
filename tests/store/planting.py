"""Planting faults into the memory store, by patching it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lightning.store import lifecycle
from lightning.store.broker import EventBroker
from lightning.store.queries import Page

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """A broken rule."""

    plant: Callable[[Patch], None]
    caught_by: tuple[str, ...]


FAULTS: list[Fault] = []


def caught_by(*tests: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Registers a fault and the tests each of which must notice it."""

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        FAULTS.append(Fault(plant, tests))
        return plant

    return register


def silence(patch: Patch, silenced: Callable[[Any], bool]) -> None:
    """Nobody is woken for such a topic."""
    original = EventBroker.publish

    def publish(self: Any, topic: Any, *, at_most: int | None = None) -> None:
        if not silenced(topic):
            original(self, topic, at_most=at_most)

    patch.setattr(EventBroker, "publish", publish)


def change_config(patch: Patch, **fields: Any) -> None:
    """Rollouts follow their attempts as if their config said this."""
    original = lifecycle._follow

    def follow(record: Any, attempt: Any, now: float) -> Any:
        generous = record._replace(config=replace(record.config, **{"max_attempts": 99, **fields}))
        return original(generous, attempt, now)._replace(config=record.config)

    patch.setattr(lifecycle, "_follow", follow)


def change_deadlines(patch: Patch, change: Callable[[float, str, Any, Any], float]) -> None:
    """Deadlines are others than they should be."""
    original = lifecycle._deadlines

    def deadlines(record: Any, attempt: Any) -> Any:
        return [
            (change(deadline, status, attempt, record.config), status)
            for deadline, status in original(record, attempt)
        ]

    patch.setattr(lifecycle, "_deadlines", deadlines)


def revive(patch: Patch, revives: Callable[[Any, Any], bool]) -> None:
    """Spans revive these attempts, and no others."""
    original = lifecycle.receive_spans

    def receive(record: Any, attempt_id: str, spans: Any, now: float) -> Any:
        after, numbers = original(record, attempt_id, spans, now)
        before = record.find_attempt(attempt_id)
        heard = before._replace(last_heartbeat_time=now)
        if before.status == "preparing":
            return after, numbers
        if revives(record, before):
            heard = heard._replace(status="running", end_time=None)
        return lifecycle._with_attempt(record, before, heard, now), numbers

    patch.setattr(lifecycle, "receive_spans", receive)


def change_page(patch: Patch, change: Callable[[Page], Page]) -> None:
    """Queries take their pages for others."""
    original = Page.of
    patch.setattr(Page, "of", staticmethod(lambda *args: change(original(*args))))
