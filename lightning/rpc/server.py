"""The server: a store on a port."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import weakref
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lightning.rpc import loop
from lightning.rpc.access_log import AccessLog
from lightning.rpc.address import (
    DEFAULT_PORT,
    check_listener,
    check_port_is_free,
    listen_error,
    parse_endpoint,
)
from lightning.rpc.admission import Admission
from lightning.rpc.client import LightningStoreClient
from lightning.rpc.credentials import FilePath
from lightning.rpc.handlers import served_capabilities
from lightning.rpc.health import Health
from lightning.rpc.interception import Observer, Reception
from lightning.rpc.metrics import Metrics
from lightning.rpc.options import ServerLimits
from lightning.rpc.pipeline_sessions import pipeline_handler
from lightning.rpc.security import Guard
from lightning.rpc.service import SERVED, StoreService
from lightning.rpc.tls import ServerTls, check_together
from lightning.rpc.tokens import make_token
from lightning.store.contract import LightningStore
from lightning.store.forwarding import ForwardingStore, complete
from lightning.store.threaded import LoopThread
from lightning.types import LightningStoreCapabilities, Stop

logger = logging.getLogger(__name__)

DEFAULT_GRACE_SECONDS = 5.0
_FLUSH_SECONDS = 0.5
"""How long answers that are already made may take to reach their callers."""
_EXIT_TIMEOUT_SECONDS = 5.0
_STATISTICS_TIMEOUT_SECONDS = 5.0


class LightningStoreServer(ForwardingStore):
    """Serves a store over gRPC, and is a store itself.

    In the process that made it, its verbs go straight to the store. Pickled into another process, or forked, it
    carries only the address, and what it takes to be let in, and is a client.

    Args:
        store: What to serve: a `LightningStore`, or any object with its methods. It is called on an event loop in a
            thread of its own, so it need not be thread-safe, and a busy caller does not hold it up.
        host: The address to listen at.
        port: The port; 0 picks a free one when the server starts.
        allow_insecure: Whether others than this machine may connect, unencrypted.
        tls_cert: The file of the server's certificate (PEM), and
        tls_key: of its private key; then connections are by TLS. They are read again when they change.
        tls_client_ca: The file of the authorities (PEM) that clients' certificates must come from; then clients without
            such a certificate are turned away.
        tokens: The file of the tokens that clients must show, see `lightning token`. It is read again when it changes.
            None: no tokens are asked for.
        max_message_bytes: The largest message that is taken or sent.
        max_wait_seconds: How long a call that waits (for work, for rollouts) is held before the client must ask again.
        remembered_seconds: How long the outcome of a call is kept for a client that lost the answer and repeats the
            call.
        remembered_bytes: How much memory these outcomes may take.
        max_streams: How many calls with more than one request or response may be open at once.
        max_in_flight_bytes: How many bytes of requests may be worked on at once: a call that is too much is refused, a
            stream waits. None: four times `max_message_bytes`.
        max_calls_per_second: How many calls a client may make, by its token's name, its certificate's, or its address.
            None: as many as it likes.
        max_connection_age: After how many seconds clients are asked to connect anew, and streams are closed to be
            opened anew: then clients of a name with several addresses find servers that came later. None: never.
        access_log: Whether each call is logged when it ends, by the logger `lightning.access`.
        metrics_port: Where to show metrics for Prometheus (`http://…/metrics`); 0 picks a port, None shows none.
        metrics_host: The address to show them at. They tell no payloads, to whoever asks.
        share_port: Whether other servers of this user's may be at the same port; connections are spread over them, on
            Linux. Only for stores that many servers may work on, and with a given port. Otherwise a taken port is an
            error.

    Raises:
        TypeError: `store` lacks a method, or an argument is of a wrong type.
        ValueError: An argument is out of range, a file is of no use, or `host` is not of this machine only and there is
            neither a certificate nor `allow_insecure`.
    """

    def __init__(
        self,
        store: Any,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        allow_insecure: bool = False,
        tls_cert: FilePath | None = None,
        tls_key: FilePath | None = None,
        tls_client_ca: FilePath | None = None,
        tokens: FilePath | None = None,
        max_message_bytes: int = ServerLimits.max_message_bytes,
        max_wait_seconds: float = ServerLimits.max_wait_seconds,
        remembered_seconds: float = ServerLimits.remembered_seconds,
        remembered_bytes: int = ServerLimits.remembered_bytes,
        max_streams: int = ServerLimits.max_streams,
        max_in_flight_bytes: int | None = ServerLimits.max_in_flight_bytes,
        max_calls_per_second: float | None = ServerLimits.max_calls_per_second,
        max_connection_age: float | None = ServerLimits.max_connection_age,
        access_log: bool = False,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        share_port: bool = False,
    ) -> None:
        self._limits = ServerLimits(
            max_message_bytes=max_message_bytes,
            max_wait_seconds=max_wait_seconds,
            remembered_seconds=remembered_seconds,
            remembered_bytes=remembered_bytes,
            max_streams=max_streams,
            max_in_flight_bytes=max_in_flight_bytes,
            max_calls_per_second=max_calls_per_second,
            max_connection_age=max_connection_age,
        )
        self._access_log = access_log
        self._share_port = share_port
        self._metrics_at = None if metrics_port is None else check_listener(metrics_host, metrics_port)
        self._tls = _tls(tls_cert, tls_key, tls_client_ca)
        self._endpoint = replace(check_listener(host, port), secure=self._tls is not None)
        if self._tls is None and not allow_insecure and not self._endpoint.is_loopback:
            raise ValueError(
                f"{host!r} is reachable from other machines, and the connection would not be encrypted; give it a "
                "certificate (tls_cert and tls_key), listen at 127.0.0.1, or say allow_insecure=True if you trust "
                "everybody in the network"
            )
        self._owner_token = None if tokens is None else make_token()
        self._guard = None if self._owner_token is None else Guard(str(tokens), self._owner_token)
        self._client_options = self._options_for_clients()
        self._owner_pid: int | None = os.getpid()
        self._store: LightningStore = complete(store)
        self._store_class = type(store).__name__
        self._running: _Running | None = None
        self._client: LightningStoreClient | None = None

    # --- Lifetime ---

    async def start(self) -> None:
        """Begin to serve. Does nothing if it serves already.

        Raises:
            OSError: A port is taken, or the host is no address of this machine.
            ImportError: `metrics_port` is given, and the package `prometheus-client` is not there.
            RuntimeError: This is not the process that made the server.
        """
        if not self._is_owner:
            raise RuntimeError("a server can be started only in the process that made it")
        if self._running is not None:
            return
        thread = loop.acquire()
        try:
            self._running = await thread.run(self._serve(thread))
        except BaseException:
            loop.release()
            raise
        self._running.end_with(self)
        self._endpoint = replace(self._endpoint, port=self._running.port)
        logger.info("serving %s at %s", self._store_class, self._endpoint)

    async def stop(
        self,
        grace: float = DEFAULT_GRACE_SECONDS,
        reason: str = "the server was stopped",
        *,
        stop_workers: bool = False,
    ) -> None:
        """Drain and stop: refuse new calls, end what waits, close streams with the reason, finish what is in flight.

        Does nothing if it does not serve. The store stays open.

        Args:
            grace: How long calls in flight may take, in seconds, before they are cancelled.
            reason: What clients are told.
            stop_workers: Tell all workers that listen to stop, because the job is over. Otherwise they wait for a
                server to come back at this address.
        """
        if not self._is_owner:
            raise RuntimeError("a server can be stopped only in the process that made it")
        running, self._running = self._running, None
        if running is None:
            return
        running.detach()
        try:
            await running.thread.run(self._drain(running, grace, reason, stop_workers))
        finally:
            loop.release()
        running.stopped.set_result(None)

    async def run_forever(self) -> None:
        """Start if need be, and return when the server was stopped. Stops it when cancelled."""
        await self.start()
        running = self._running
        if running is None:
            return
        try:
            await running.wait_until_stopped()
        finally:
            await self.stop()

    async def close(
        self, grace: float = DEFAULT_GRACE_SECONDS, reason: str = "the server was stopped"
    ) -> None:
        """In the process that made it: `stop`, and close the store. Elsewhere: close the connection."""
        if self._is_owner and self._running is None:
            await self._store.close()
        elif self._is_owner:
            thread = loop.acquire()  # where it served, the store may have connections: it is closed there
            try:
                await self.stop(grace, reason)
                await thread.run(self._store.close())
            finally:
                loop.release()
        elif self._client is not None:
            await self._client.close()

    @property
    def endpoint(self) -> str:
        """Where clients on this machine reach it: `host:port`, or `grpcs://host:port` if by TLS. Raises `RuntimeError`
        while the port is not picked."""
        if not self._endpoint.port:
            raise RuntimeError("port 0 becomes a port when the server starts; start it first")
        return str(self._endpoint.reachable)

    @property
    def port(self) -> int:
        """The port; 0 if one is to be picked when the server starts."""
        return self._endpoint.port

    @property
    def metrics_url(self) -> str | None:
        """Where it shows metrics, while it does."""
        return None if self._running is None else self._running.metrics_url

    @property
    def client_options(self) -> dict[str, Any]:
        """What the owner's `LightningStoreClient` on this machine needs to be let in. It may hold a secret that allows
        everything, and is valid as long as this server lives; hand it to nobody else."""
        return dict(self._client_options)

    # --- As a store ---

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        if not self._is_owner:
            return self._as_client().capabilities
        return served_capabilities(self._store)

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        if not self._is_owner:
            return await getattr(self._as_client(), verb)(*args, **kwargs)
        running = self._running
        call = getattr(self._store, verb)(*args, **kwargs)
        return await (call if running is None else running.thread.run(call))

    def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        store = self._store if self._is_owner else self._as_client()
        stream: AsyncGenerator[Any, None] = getattr(store, verb)(*args, **kwargs)
        running = self._running if self._is_owner else None
        return stream if running is None else running.thread.run_stream(stream)

    def __getstate__(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "client_options": self._client_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner_pid = None
        self._running = None
        self._client = None
        self._endpoint = parse_endpoint(state["endpoint"])
        self._client_options = state["client_options"]

    @property
    def _is_owner(self) -> bool:
        return self._owner_pid == os.getpid()

    def _as_client(self) -> LightningStoreClient:
        if self._client is None:
            self._client = LightningStoreClient(self.endpoint, **self._client_options)
        return self._client

    def _options_for_clients(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "max_message_bytes": self._limits.max_message_bytes,
            "allow_insecure": True,
        }
        if self._owner_token is not None:
            options["token"] = self._owner_token
        if self._tls is not None:
            options["tls_ca"] = self._tls.cert  # trusts this one certificate, whoever issued it
            names = self._tls.check()
            if self._endpoint.reachable.host not in names:
                options["tls_server_name"] = next(name for name in names if not name.startswith("*"))
            if self._tls.client_ca is not None:
                options.update(tls_cert=self._tls.cert, tls_key=self._tls.key)
        return options

    # --- On the loop of gRPC ---

    async def _serve(self, thread: LoopThread) -> _Running:
        if not self._share_port:
            check_port_is_free(self._endpoint)
        checks = Health(SERVED, self._store.check_writable)
        metrics = self._metrics(thread, checks)
        service = StoreService(self._store, self._store_class, self._limits, checks.suspect)
        observers: list[Observer] = [] if metrics is None else [metrics]
        if self._access_log:
            observers.append(AccessLog())
        admission = Admission(self._limits)
        reception = Reception(
            self._guard,
            admission,
            observers,
            certificates=self._tls is not None and self._tls.client_ca is not None,
        )
        options = self._limits.channel_options(share_port=self._share_port)
        server = grpc.aio.server(options=options, interceptors=(reception,))
        server.add_generic_rpc_handlers((*service.generic_handlers(), pipeline_handler(service, reception)))
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection(
            (
                *SERVED,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            server,
        )
        running = _Running(thread, server, service, checks, admission, metrics)
        try:
            if metrics is not None and self._metrics_at is not None:
                running.metrics_url = f"http://{metrics.serve(self._metrics_at)}/metrics"
            running.port = self._listen(server)
            await server.start()
        except BaseException:
            await running.close()
            raise
        await checks.begin()
        return running

    def _metrics(self, thread: LoopThread, checks: Health) -> Metrics | None:
        if self._metrics_at is None:
            return None
        store = self._store

        def ask() -> Mapping[str, Any]:
            return thread.run_blocking(store.statistics(), _STATISTICS_TIMEOUT_SECONDS)

        return Metrics(ask, lambda: checks.is_serving)

    def _listen(self, server: grpc.aio.Server) -> int:
        try:
            if self._tls is None:
                return server.add_insecure_port(self._endpoint.target)
            return server.add_secure_port(self._endpoint.target, self._tls.credentials())
        except RuntimeError as error:  # taken since we looked
            raise listen_error(self._endpoint, None, str(error)) from None

    async def _drain(self, running: _Running, grace: float, reason: str, stop_workers: bool) -> None:
        await running.health.drain()
        stop = Stop(reason=reason) if stop_workers else None
        await running.service.drain(reason, grace, stop)
        if stop is not None:
            try:
                await self._store.send_command(
                    stop
                )  # to workers in this process, and at other servers of the store
            except Exception as error:  # noqa: BLE001  # it ends all the same
                logger.warning("workers elsewhere could not be told to stop: %s", error)
        running.health.end_watches()
        await running.close(_FLUSH_SECONDS)


def _tls(cert: FilePath | None, key: FilePath | None, client_ca: FilePath | None) -> ServerTls | None:
    check_together(tls_cert=cert, tls_key=key)
    if cert is None or key is None:
        if client_ca is not None:
            raise ValueError("tls_client_ca is given without tls_cert and tls_key")
        return None
    return ServerTls(str(cert), str(key), None if client_ca is None else str(client_ca))


class _Running:
    """What exists while a server serves."""

    def __init__(
        self,
        thread: LoopThread,
        server: grpc.aio.Server,
        service: StoreService,
        health: Health,
        admission: Admission,
        metrics: Metrics | None,
    ) -> None:
        self.thread = thread
        self.server = server
        self.service = service
        self.health = health
        self.admission = admission
        self.port = 0
        self.metrics_url: str | None = None
        self._metrics = metrics
        self.stopped: Future[None] = Future()
        self._pid = os.getpid()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    async def close(self, grace: float | None = None) -> None:
        """End everything; calls in flight may take `grace` seconds."""
        await self.server.stop(grace)
        await self.service.close()
        if self._metrics is not None:
            await self._metrics.close()

    def end_with(self, owner: LightningStoreServer) -> None:
        """Stop serving when the interpreter exits, or `owner` is forgotten, without having been stopped."""
        self._finalizer = weakref.finalize(owner, self._abandon)
        self._finalizer.atexit = False  # that would be after the end of the event loop
        atexit.register(self._stop_at_exit)

    def detach(self) -> None:
        """The server is being stopped properly."""
        atexit.unregister(self._stop_at_exit)
        if self._finalizer is not None:
            self._finalizer.detach()

    def _abandon(self) -> None:
        atexit.unregister(self._stop_at_exit)
        if self._pid == os.getpid() and not self.thread.stopped:
            self.thread.submit(self.close()).add_done_callback(lambda _: loop.release())

    def _stop_at_exit(self) -> None:
        if self._pid == os.getpid() and not self.thread.stopped:
            self.thread.run_blocking(self.close(), _EXIT_TIMEOUT_SECONDS)

    async def wait_until_stopped(self) -> None:
        # shielded, for cancelling one that waits must not tell the others that the server stopped
        await asyncio.shield(asyncio.wrap_future(self.stopped))
