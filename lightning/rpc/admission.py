"""Whether there is room for one more call: how many a client may make, how many streams may be open, and how much of
what was sent may be worked on at once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from lightning.rpc.errors import OverloadedError
from lightning.rpc.security import PERMISSIONS, Permission

if TYPE_CHECKING:
    from lightning.rpc.interception import Call
    from lightning.rpc.options import ServerLimits

_MAX_CLIENTS = 10_000
"""As many are remembered, for the rate of their calls; of those that called longest ago nothing matters any more."""


class Place:
    """The room that a call takes up, which it gives back at the end of the block."""

    __slots__ = ("_admission", "_call")

    def __init__(self, admission: Admission, call: Call) -> None:
        self._admission = admission
        self._call = call

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self._call)


class Admission:
    """Holds a server to its limits. Belongs to one event loop.

    Args:
        limits: What they are.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._allowances: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By client: how many calls it may make at once, and when that was so."""
        self.held_bytes = 0
        """How many bytes of requests are being worked on."""
        self._freed = asyncio.Event()
        self.streams = 0
        """How many streams are open."""

    def enter(self, call: Call) -> Place:
        """Room for a call that begins.

        Raises:
            OverloadedError: There is no room for it.
        """
        self._check_rate(call)
        limits = self._limits
        if call.is_stream and self.streams >= limits.max_streams:
            raise OverloadedError(
                f"the server has {self.streams} streams open already; raise max_streams of LightningStoreServer "
                "(--max-streams)"
            )
        size_bytes = call.received_bytes
        if self.held_bytes + size_bytes > limits.in_flight_bytes:
            raise OverloadedError(
                f"the server is working on requests of {self.held_bytes} bytes, and has no room for {size_bytes} "
                "more; send less at a time, or raise max_in_flight_bytes of LightningStoreServer "
                "(--max-in-flight-bytes)"
            )
        self.streams += call.is_stream
        self._hold(call, size_bytes)
        return Place(self, call)

    def leave(self, call: Call) -> None:
        """A call is over."""
        self.streams -= call.is_stream
        self._let_go(call)

    async def held(self, requests: AsyncIterator[Any], call: Call) -> AsyncGenerator[Any, None]:
        """The requests of a stream, each of which waits until there is room for it; the client notices by flow control
        that no more is read."""
        counted_bytes = call.received_bytes
        async for request in requests:
            size_bytes, counted_bytes = call.received_bytes - counted_bytes, call.received_bytes
            while self.held_bytes and self.held_bytes + size_bytes > self._limits.in_flight_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._hold(call, size_bytes)
            yield request
            self._let_go(call)

    def _hold(self, call: Call, size_bytes: int) -> None:
        call.held_bytes = size_bytes
        self.held_bytes += size_bytes

    def _let_go(self, call: Call) -> None:
        self.held_bytes -= call.held_bytes
        call.held_bytes = 0
        self._freed.set()

    def _check_rate(self, call: Call) -> None:
        rate = self._limits.max_calls_per_second
        if rate is None or call.is_carrier or PERMISSIONS.get(call.method) is Permission.OPEN:
            return
        now = time.monotonic()
        burst = max(rate, 1.0)
        allowance, since = self._allowances.pop(call.client, (burst, now))
        allowance = min(burst, allowance + (now - since) * rate)
        admitted = allowance >= 1.0
        self._allowances[call.client] = (allowance - admitted, now)
        while len(self._allowances) > _MAX_CLIENTS:
            self._allowances.popitem(last=False)
        if not admitted:
            raise OverloadedError(
                f"{call.client!r} makes more than {rate:g} calls a second; slow down, or raise max_calls_per_second "
                "of LightningStoreServer (--max-calls-per-second)"
            )
