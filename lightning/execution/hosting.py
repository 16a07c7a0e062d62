"""Where a job's store lives, and how the job's processes reach it."""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import cloudpickle

from lightning.execution.commands import tell_runners
from lightning.execution.entries import Serving, serve_store
from lightning.execution.job import Job
from lightning.execution.processes import ChildProcess, Payload, stop_children
from lightning.store.contract import LightningStore
from lightning.store.forwarding import ForwardingStore, complete
from lightning.types import Drain, LightningStoreCapabilities, Stop

if TYPE_CHECKING:
    from lightning.rpc.client import LightningStoreClient
    from lightning.rpc.server import LightningStoreServer

_STOP_REASON = "the job is over"
_SERVER_NAME = "store server"


class StoreHost(ABC):
    """Brings the store up for a job, and down after it. `start` before the rest, and `stop` in any case."""

    exclusive: bool
    """Whether the store is there for this job only, so that all runners at it are this job's."""
    alive = True
    """False when the store is known to be gone."""

    @abstractmethod
    async def start(self) -> None:
        """Bring it up. Raises `ExecutionError`, or whatever the store raises, if that fails."""

    @abstractmethod
    async def stop(self) -> None:
        """Bring it down, with a reason for those who are still connected."""

    @property
    @abstractmethod
    def store(self) -> LightningStore:
        """The store, for this process; safe to use from any of its threads."""

    @property
    def pickled_store(self) -> bytes:
        """The store, for child processes."""
        return pickle_store(self.store)

    async def tell_runners(self, command: Drain | Stop, worker_ids: list[str] | None = None) -> None:
        """Send a command to these workers, or to all. Raises nothing."""
        if self.alive:
            await tell_runners(self.store, command, worker_ids)


def pickle_store(store: LightningStore) -> bytes:
    """Pickle what a child process reaches the store by. Raises `TypeError` saying what to do if it cannot be."""
    try:
        pickled: bytes = cloudpickle.dumps(store)
    except Exception as error:
        raise TypeError(
            f"{type(store).__name__} cannot be used from other processes as it is ({error}): leave managed_store on, "
            f"or give a LightningStoreClient"
        ) from error
    return pickled


class GivenStore(StoreHost):
    """A store that other processes can reach as it is: a client of a server that runs elsewhere.

    Args:
        store: Stays its giver's to close.
    """

    exclusive = False

    def __init__(self, store: LightningStore) -> None:
        self._store = store

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return

    @property
    def store(self) -> LightningStore:
        return self._store


class _Client(StoreHost):
    """A host that is reached over gRPC, here and in the children."""

    _client: LightningStoreClient | None = None

    @property
    def store(self) -> LightningStoreClient:
        assert self._client is not None
        return self._client

    def _connect(self, endpoint: str, options: Mapping[str, Any]) -> None:
        from lightning.rpc.client import LightningStoreClient

        self._client = LightningStoreClient(endpoint, **options)

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.close()


class RemoteServer(_Client):
    """A server that runs already, or soon will.

    Args:
        endpoint: Its address, as `LightningStoreClient` takes it.
        connect_timeout: How long to wait for it, in seconds.
        client_options: Options of the `LightningStoreClient`.
    """

    exclusive = False

    def __init__(self, endpoint: str, connect_timeout: float, client_options: Mapping[str, Any]) -> None:
        self._endpoint = endpoint
        self._client_options = client_options
        self._connect_timeout = connect_timeout

    async def start(self) -> None:
        self._connect(self._endpoint, self._client_options)
        await self.store.wait_until_ready(self._connect_timeout)


class ServerProcess(_Client):
    """A store in a server process of its own, so that a computing algorithm does not keep it from answering.

    Args:
        job: Fails when the process dies.
        url: Names the store's backend, see `open_store`.
        host: Address to listen at.
        port: Port to listen at; 0 picks one.
        server_options: Options of the `LightningStoreServer`.
        client_options: Options of the `LightningStoreClient`, before those that the server itself has for its owner.
    """

    exclusive = True

    def __init__(
        self,
        job: Job,
        url: str,
        host: str,
        port: int,
        server_options: Mapping[str, Any],
        client_options: Mapping[str, Any],
    ) -> None:
        self._job = job
        self._client_options = client_options
        entry = functools.partial(serve_store, url=url, host=host, port=port, server_options=server_options)
        self._payload = Payload(entry, "the store's settings")
        self._child: ChildProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    def launch(self) -> None:
        """Start the process; `start` waits for it."""
        self._child = ChildProcess(_SERVER_NAME, self._payload)
        self._watch = asyncio.create_task(self._fail_with(self._child))

    async def start(self) -> None:
        assert self._child is not None
        serving: Serving = await asyncio.shield(self._child.reported)
        self._connect(serving.endpoint, {**serving.client_options, **self._client_options})

    async def _fail_with(self, child: ChildProcess) -> None:
        await asyncio.wait({child.exited})
        self.alive = False
        if not self._stopping:
            self._job.fail(child.error())

    async def stop(self) -> None:
        await super().stop()
        if self._child is None or self._watch is None:
            return
        self._stopping = True
        if self._child.reported.done():
            self._child.send(_STOP_REASON)
        await stop_children(self._job, [self._child], wait_first=self._child.reported.done())
        await self._watch
        if self._child.failed is not None or self._child.killed:
            self._job.fail(self._child.error())


class ServedStore(StoreHost):
    """A store object of the user's, served from this process, on the event loop of its server.

    Args:
        server: Is started if it does not serve yet.
        own: Whether it was made for this job, and is stopped after it.
    """

    def __init__(self, server: LightningStoreServer, *, own: bool) -> None:
        self._server = server
        self.exclusive = own

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        if self.exclusive:
            await self._server.stop(reason=_STOP_REASON, stop_workers=True)

    @property
    def store(self) -> LightningStore:
        return self._server


class LentStore(ForwardingStore):
    """A store that whoever it is lent to cannot close.

    Args:
        store: Any object with the contract's methods.
    """

    def __init__(self, store: Any) -> None:
        self._store = complete(store)

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return self._store.capabilities

    async def close(self) -> None:
        return

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._store, verb)(*args, **kwargs)

    def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return getattr(self._store, verb)(*args, **kwargs)  # type: ignore[no-any-return]
