"""Who waits for what, and waking them: notification, kept apart from state.

The broker knows nothing of rollouts or workers. Publishing a topic wakes its subscribers, on whatever event loop and
thread they wait; a subscriber looks at the state itself before and after it waits, so a wake-up too many is harmless.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from types import TracebackType

from lightning.store.clock import Clock, SystemClock

Topic = Hashable


class EventBroker:
    """Topics and their subscribers within one process. Safe to use from many threads and event loops."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._subscribers: dict[Topic, OrderedDict[Subscription, None]] = {}
        self._closed = False

    def subscribe(self, topics: Iterable[Topic]) -> Subscription:
        """Start collecting notifications of `topics` for the running event loop; use it as a context manager."""
        return Subscription(self, tuple(topics))

    def publish(self, topic: Topic, *, at_most: int | None = None) -> None:
        """Wake the subscribers of `topic`.

        Args:
            topic: What happened.
            at_most: Wake only so many, longest waiting first: with one new task there is no use in waking thousands.
                A subscriber that leaves without having acted on such a wake-up passes it on.
        """
        with self._lock:
            self._publish(topic, at_most)

    def publish_all(self) -> None:
        """Wake everybody, whatever they wait for: something may have happened unnoticed."""
        with self._lock:
            for topic in list(self._subscribers):
                self._publish(topic, None)

    def is_awaited(self, *, except_for: Topic) -> bool:
        """Whether anybody waits for anything, one topic aside."""
        with self._lock:
            return any(topic != except_for for topic in self._subscribers)

    def close(self) -> None:
        """Wake everybody for good: `Subscription.wait` raises `BrokerClosed` from now on."""
        with self._lock:
            self._closed = True
            for topic in list(self._subscribers):
                self._publish(topic, None)

    def _publish(self, topic: Topic, at_most: int | None) -> None:
        subscribers = self._subscribers.get(topic)
        if not subscribers:
            return
        if at_most is None:
            for subscription in list(subscribers):
                subscription.fire(topic)
            return
        # Woken ones move to the end, so the first that has its wake-up already ends the search.
        while at_most > 0 and subscribers:
            subscription = next(iter(subscribers))
            if topic in subscription.fired:
                return
            subscribers.move_to_end(subscription)
            if subscription.fire(topic):
                at_most -= 1
            else:  # its event loop is closed: nobody waits there any more
                del subscribers[subscription]

    def add(self, subscription: Subscription) -> None:
        """For `Subscription` only."""
        with self._lock:
            for topic in subscription.topics:
                self._subscribers.setdefault(topic, OrderedDict())[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        """For `Subscription` only."""
        with self._lock:
            for topic in subscription.topics:
                subscribers = self._subscribers.get(topic)
                if subscribers is not None:
                    subscribers.pop(subscription, None)
                    if not subscribers:
                        del self._subscribers[topic]
            for topic in subscription.fired:
                self._publish(topic, 1)

    def take(self, subscription: Subscription) -> set[Topic]:
        """For `Subscription` only: what was published to it since the last call."""
        with self._lock:
            fired, subscription.fired = subscription.fired, set()
            return fired

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed


class BrokerClosed(RuntimeError):
    """The store was closed while somebody waited on it, or before."""


class Subscription:
    """One waiter's interest in some topics. Made by `EventBroker.subscribe`."""

    def __init__(self, broker: EventBroker, topics: tuple[Topic, ...]) -> None:
        self.topics = topics
        self.fired: set[Topic] = set()
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    def __enter__(self) -> Subscription:
        self._broker.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broker.remove(self)

    async def wait(self, until: float | None = None) -> set[Topic]:
        """Wait for a notification.

        Args:
            until: Give up at this time (of the broker's clock); None: never.

        Returns:
            The topics published since the last call; empty when the time is up.

        Raises:
            BrokerClosed: The broker was closed.
        """
        clock = self._broker.clock
        # A wake-up may be left over from a topic that was taken already: only time itself ends the wait without one.
        while not self.fired and not self._broker.closed and (until is None or clock.now() < until):
            self._future = self._loop.create_future()
            cancel = None if until is None else clock.call_at(until, self._wake)
            try:
                if not self.fired and not self._broker.closed:  # published from another thread meanwhile
                    await self._future
            finally:
                self._future = None
                if cancel is not None:
                    cancel()
        if self._broker.closed:
            raise BrokerClosed("the store was closed")
        return self._broker.take(self)

    def fire(self, topic: Topic) -> bool:
        """For `EventBroker` only, under its lock: note the topic and wake the waiter. False if its loop is closed."""
        self.fired.add(topic)
        try:
            if asyncio._get_running_loop() is self._loop:
                self._wake()
            else:
                self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return False
        return True

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
