"""A TCP proxy that misbehaves on demand, to test what clients make of a bad network."""

from __future__ import annotations

import asyncio

_CHUNK_BYTES = 65536


class TcpProxy:
    """Stands between clients and a server on this machine.

    Args:
        port: The server's.
    """

    def __init__(self, port: int) -> None:
        self._target_port = port
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._connected = asyncio.Condition()
        self.swallows_answers = False
        """While True, what the server sends is lost on the way."""
        self.connections = 0
        """How many were made so far."""

    async def start(self) -> str:
        """Listen; returns the address to connect to."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections. New ones can be made."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def wait_for_connections(self, count: int) -> None:
        """Wait until so many connections were made, counted from the beginning."""
        async with self._connected:
            await self._connected.wait_for(lambda: self.connections >= count)

    async def close(self) -> None:
        """Break all connections and listen no more."""
        if self._listener is not None:
            self._listener.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, downstream = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, downstream}
        self._pump(reader, downstream, answers=False)
        self._pump(upstream, writer, answers=True)
        async with self._connected:
            self.connections += 1
            self._connected.notify_all()

    def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        task = asyncio.ensure_future(self._forward(source, sink, answers))
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(_CHUNK_BYTES):
                if not (answers and self.swallows_answers):
                    sink.write(data)
                    await sink.drain()
        except OSError:
            return  # cut
        finally:
            self._writers.discard(sink)
            sink.transport.abort()
