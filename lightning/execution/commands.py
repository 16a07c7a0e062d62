"""Telling runners that it is over, and hearing it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from lightning.backoff import STORE_AWAY, Backoff
from lightning.store.broker import EventBroker
from lightning.store.contract import LightningStore
from lightning.store.forwarding import ForeignStore
from lightning.types import Drain, Stop, WorkerCommand

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_SECONDS = 2.0
"""How long telling them may take."""
_LISTEN_SECONDS = 30.0
"""How long one call listens at the store; the next follows at once."""
_PARENT = ("parent",)
"""The broker's topic of what the parent says."""


async def tell_runners(
    store: LightningStore, command: Drain | Stop, worker_ids: list[str] | None = None
) -> None:
    """Send a command to these workers (None: to all). A store that cannot be reached is only a warning: those of
    this machine learn it in other ways as well."""
    listeners = [None] if worker_ids is None else worker_ids
    telling = asyncio.gather(*(store.send_command(command, worker_id) for worker_id in listeners))
    try:
        await asyncio.wait_for(telling, _TELL_TIMEOUT_SECONDS)
    except Exception as error:  # noqa: BLE001 - logged; the job goes on
        logger.warning(
            "the runners could not be told to %s: %s: %s", command.kind, type(error).__name__, error
        )


async def hear_stop(store: LightningStore, name: str) -> None:
    """Listen as the worker `name`, and return when it is told to stop. A store that is away is waited for."""
    instance_id, backoff = uuid.uuid4().hex, Backoff()
    while True:
        try:
            commands = await store.receive_commands(name, instance_id=instance_id, timeout=_LISTEN_SECONDS)
        except STORE_AWAY:  # the runners say so
            await backoff.sleep()
            continue
        backoff.recovered()
        for command in commands:
            if isinstance(command, Stop):
                logger.info("%s stops: %s", name, command.reason or "as it was told")
                return


class CommandedStore(ForeignStore):
    """A runner's store, through which its parent process can tell it too: also while the store is out of reach, and
    with no permission there to command workers.

    Args:
        store: Where work and all other commands come from; is closed with this one.
    """

    def __init__(self, store: LightningStore) -> None:
        super().__init__(store)
        self._broker = EventBroker()
        self._command: WorkerCommand | None = None
        self._heard: dict[tuple[str, str | None], WorkerCommand] = {}

    def tell(self, command: WorkerCommand) -> None:
        """Give a command to each worker that listens, or begins to. May be called from any thread."""
        self._command = command
        self._broker.publish(_PARENT)

    async def receive_commands(
        self, worker_id: str, *, instance_id: str | None = None, timeout: float | None = None
    ) -> Sequence[WorkerCommand]:
        with self._broker.subscribe([_PARENT]) as parent:
            own = self._own((worker_id, instance_id))
            if own:
                return own
            at_store: asyncio.Future[Sequence[WorkerCommand]] = asyncio.ensure_future(
                self._store.receive_commands(worker_id, instance_id=instance_id, timeout=timeout)
            )
            at_parent: asyncio.Future[Any] = asyncio.ensure_future(parent.wait(None))
            both: set[asyncio.Future[Any]] = {at_store, at_parent}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                at_parent.cancel()
                at_store.cancel()
                await asyncio.wait(both)
            if not at_store.cancelled():
                return at_store.result()  # the next call brings what the parent says
            return self._own((worker_id, instance_id))

    def _own(self, listener: tuple[str, str | None]) -> list[WorkerCommand]:
        """The parent's command, if this listener has not heard it yet."""
        command = self._command
        if command is None or self._heard.get(listener) is command:
            return []
        self._heard[listener] = command
        return [command]
