"""Commands on their way to workers: short-lived, in memory, one mailbox per worker process that listens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from lightning.store.broker import EventBroker
from lightning.types import WorkerCommand

_ABANDONED_AFTER_SECONDS = 120.0
_MAX_PENDING_COMMANDS = 1024

MailboxKey = tuple[str, "str | None"]


class _Mailbox:
    __slots__ = ("last_read", "listeners", "pending")

    def __init__(self) -> None:
        self.pending: deque[WorkerCommand] = deque(maxlen=_MAX_PENDING_COMMANDS)
        self.listeners = 0
        self.last_read = time.monotonic()


class WorkerMailboxes:
    """Delivers commands to listening workers.

    A mailbox opens with the first `receive` of a worker process and keeps what arrives between two of its calls. It
    is dropped when nobody has listened for two minutes: a worker that comes back later learns what it missed from the
    reply to its heartbeat.
    """

    def __init__(self, broker: EventBroker | None = None) -> None:
        self._broker = broker or EventBroker()
        self._lock = threading.Lock()
        self._boxes: dict[MailboxKey, _Mailbox] = {}

    def send(self, command: WorkerCommand, worker_id: str | None) -> int:
        """Put a command into the boxes of one worker's processes, or of all (None); returns how many there are."""
        with self._lock:
            self._drop_abandoned()
            keys = [key for key in self._boxes if worker_id is None or key[0] == worker_id]
            for key in keys:
                self._boxes[key].pending.append(command)
        for key in keys:
            self._broker.publish(("mailbox", key))
        return len(keys)

    async def receive(
        self, worker_id: str, instance_id: str | None, timeout: float | None
    ) -> Sequence[WorkerCommand]:
        """Take everything out of a box, waiting up to `timeout` seconds (None: for ever) for something to be there."""
        key = (worker_id, instance_id)
        clock = self._broker.clock
        until = None if timeout is None else clock.now() + timeout
        with self._broker.subscribe([("mailbox", key)]) as subscription:
            box = self._open(key)
            try:
                while True:
                    with self._lock:
                        commands = list(box.pending)
                        box.pending.clear()
                    if commands or not (timeout is None or timeout > 0):
                        return commands
                    if not await subscription.wait(until):
                        timeout = 0
            finally:
                with self._lock:
                    box.listeners -= 1
                    box.last_read = time.monotonic()

    def _open(self, key: MailboxKey) -> _Mailbox:
        with self._lock:
            box = self._boxes.setdefault(key, _Mailbox())
            box.listeners += 1
            return box

    def _drop_abandoned(self) -> None:
        oldest = time.monotonic() - _ABANDONED_AFTER_SECONDS
        for key in [k for k, box in self._boxes.items() if not box.listeners and box.last_read < oldest]:
            del self._boxes[key]
