"""Telling runners that it is over, and hearing it."""

from __future__ import annotations

import asyncio
import logging
import uuid

from lightning.backoff import STORE_AWAY, Backoff
from lightning.store.contract import LightningStore
from lightning.types import Drain, Stop

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_SECONDS = 2.0
"""How long telling them may take."""
_LISTEN_SECONDS = 30.0
"""How long one call listens at the store; the next follows at once."""


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
