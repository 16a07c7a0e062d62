"""A TCP proxy that misbehaves on demand, to test what clients and servers make of a bad network."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

_CHUNK_BYTES = 65536

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Disorder:
    """How badly a proxy behaves all the time, at random."""

    seed: int = 0
    delay_seconds: float = 0.0
    """Each piece of data is held back for up to so long."""
    hold_seconds: float = 0.0
    """Each connection is held back for up to so long before it reaches the server: a later one may overtake it."""
    duplicates: float = 0.0
    """The share of connections whose requests the server sees a second time, on a connection of their own. Its answers
    to those are thrown away."""
    stragglers: float = 0.0
    """The share of cut connections of which what was under way to the server still arrives there, after the cut."""


class TcpProxy:
    """Stands between clients and a server on this machine.

    Args:
        port: The server's.
        disorder: What it does to connections beside what it is told to.
    """

    def __init__(self, port: int, disorder: Disorder | None = None) -> None:
        self.disorder = disorder or Disorder()
        self._chance = random.Random(self.disorder.seed)
        self._target_port = port
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._connected = asyncio.Condition()
        self.swallows_answers = False
        """While True, what the server sends is lost on the way."""
        self.passes = asyncio.Event()
        """While it is not set, nothing arrives on either side, and neither is told."""
        self.passes.set()
        self.connections = 0
        """How many were made so far."""
        self.duplicated = 0
        """How many of them reached the server twice."""
        self.straggled = 0
        """How many brought something to the server after they had been cut."""

    async def start(self) -> str:
        """Listen; returns the address to connect to."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections. New ones can be made."""
        for link in list(self._links):
            link.cut(straggles=self._happens(self.disorder.stragglers))

    async def wait_for_connections(self, count: int) -> None:
        """Wait until so many connections were made, counted from the beginning."""
        async with self._connected:
            await self._connected.wait_for(lambda: self.connections >= count)

    async def close(self) -> None:
        """Break all connections and listen no more."""
        if self._listener is not None:
            self._listener.close()
        self.passes.set()
        links = list(self._links)
        for link in links:
            link.cut()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, reader, writer)
        self._links.add(link)
        link.task.add_done_callback(lambda _: self._links.discard(link))

    # --- For its connections ---

    async def pause(self, most_seconds: float) -> None:
        """Let some time pass, up to so much."""
        if most_seconds:
            await asyncio.sleep(self._chance.uniform(0, most_seconds))
        await self.passes.wait()

    async def connect(self, made: list[_Connection]) -> None:
        """Connect to the server, once or twice."""
        made.append(await asyncio.open_connection("127.0.0.1", self._target_port))
        if self._happens(self.disorder.duplicates):
            made.append(await asyncio.open_connection("127.0.0.1", self._target_port))
            self.duplicated += 1
        async with self._connected:
            self.connections += 1
            self._connected.notify_all()

    def _happens(self, share: float) -> bool:
        return self._chance.random() < share


class _Link:
    """One client's connection, and those to the server that go with it, of which only the first one's answers count."""

    def __init__(self, proxy: TcpProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._servers: list[_Connection] = []
        self._connected = False
        self._is_cut = False
        self._straggles = False
        self.task = asyncio.ensure_future(self._run())

    def cut(self, *, straggles: bool = False) -> None:
        """Break the client's connection, and those to the server too, unless something `straggles` on them."""
        self._writer.transport.abort()
        self._is_cut = True
        self._straggles = straggles
        if self._connected and not straggles:
            self.task.cancel()

    async def _run(self) -> None:
        pumps: list[asyncio.Future[None]] = []
        try:
            await self._proxy.pause(self._proxy.disorder.hold_seconds)
            await self._proxy.connect(self._servers)
            if self._is_cut and not self._straggles:
                return
            self._connected = True
            answers = [
                self._carry_answers(reader, first=not n) for n, (reader, _) in enumerate(self._servers)
            ]
            pumps = [asyncio.ensure_future(pump) for pump in (self._carry_requests(), *answers)]
            await asyncio.wait(pumps[:2], return_when=asyncio.FIRST_COMPLETED)
            if self._straggles:
                await asyncio.wait(pumps[:1])
        except OSError:
            return  # no server is there
        finally:
            writers = (self._writer, *(writer for _, writer in self._servers))
            for writer in writers:
                writer.transport.abort()
            for pump in pumps:
                pump.cancel()
            ends = (*pumps, *(writer.wait_closed() for writer in writers))
            await asyncio.gather(*ends, return_exceptions=True)

    async def _carry_requests(self) -> None:
        while data := await self._reader.read(_CHUNK_BYTES):
            await self._proxy.pause(self._proxy.disorder.delay_seconds)
            self._proxy.straggled += self._straggles
            for _, writer in self._servers:
                writer.write(data)
                await writer.drain()

    async def _carry_answers(self, reader: asyncio.StreamReader, *, first: bool) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if first:
                await self._proxy.pause(self._proxy.disorder.delay_seconds)
                if not self._proxy.swallows_answers:
                    self._writer.write(data)
                    await self._writer.drain()
