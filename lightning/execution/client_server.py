"""Execution in processes that meet at a store over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

from lightning.execution.base import (
    WORKER_PREFIX_VARIABLE,
    AlgorithmBundle,
    ExecutionStrategy,
    RunnerBundle,
)
from lightning.execution.commands import hear_stop
from lightning.execution.entries import run_algorithm
from lightning.execution.events import MultiprocessingEvent
from lightning.execution.fleet import RunnerFleet
from lightning.execution.hosting import (
    GivenStore,
    LentStore,
    RemoteServer,
    ServedStore,
    ServerProcess,
    StoreHost,
)
from lightning.execution.job import Job, first_of
from lightning.execution.processes import ChildProcess, Payload, stop_children
from lightning.store.contract import LightningStore
from lightning.types import Stop

logger = logging.getLogger(__name__)

T = TypeVar("T")

Role = Literal["algorithm", "runner", "both"]
MainProcess = Literal["algorithm", "runner"]

DEFAULT_PORT = 4747
_DEFAULT_HOST = "127.0.0.1"
_VARIABLE_PREFIXES = ("LIGHTNING_", "AGL_")
_ROLE_VARIABLES = ("LIGHTNING_ROLE", "AGL_CURRENT_ROLE")
_FAREWELL_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 3.0
"""How long runners elsewhere may take to report, at the end of a job; some of them may be dead."""
_ALGORITHM_NAME = "algorithm"


class ClientServerExecutionStrategy(ExecutionStrategy):
    """The algorithm, the store and each runner in a process of its own; on one machine, or on many.

    Args:
        role: What this program is: `"both"` starts everything on this machine; `"algorithm"` runs the store server and
            the algorithm, for runners that connect from anywhere; `"runner"` runs runners for a server elsewhere.
            None: what `LIGHTNING_ROLE` says, else `"both"`.
        server_host: Where the server listens, or is to be found. None: `LIGHTNING_SERVER_HOST`, else `127.0.0.1`.
        server_port: Its port; 0 picks a free one. None: `LIGHTNING_SERVER_PORT`, else 0 for `"both"`, 4747 for the
            other roles, who need to find each other.
        n_runners: How many runner processes.
        graceful_timeout: Seconds that a process gets to end after it was asked to, and again after SIGINT.
        terminate_timeout: Seconds that it gets after SIGTERM, before it is killed.
        main_process: With role `"both"`, what runs in this process: `"algorithm"`, or `"runner"` to set breakpoints in
            an agent (then there is one runner, and what the algorithm keeps in attributes stays in its process).
        managed_store: Whether a store object is to be served; False uses it as it is, which needs a store that other
            processes can reach. A `LightningStoreClient` is always used as it is. None: `LIGHTNING_MANAGED_STORE`, else
            True.
        allowed_exit_codes: How a runner process may end after it was told to without a warning; negative: the signal.
        store_url: Which store the server opens when `execute` is given none, see `open_store`.
        restart_budget: How often a runner process that died is started again within a minute.
        connect_timeout: Seconds that role `"runner"` waits for the server to appear.
        allow_insecure: Whether the server may listen where other machines reach it although nothing is encrypted, and
            clients may send their token to such a one.
        server_options: Further options of the `LightningStoreServer`, such as `tls_cert`, `tls_key` and `tokens`. The
            job's own processes are let in without further ado.
        client_options: Options of the `LightningStoreClient`, such as `tls_ca` and `token`; for role `"runner"` mostly,
            which connects by TLS if one of them is about that or `server_host` begins with `grpcs://`.

    The peer's variables `AGL_CURRENT_ROLE`, `AGL_SERVER_HOST`, `AGL_SERVER_PORT` and `AGL_MANAGED_STORE` are honoured
    where ours are not set.

    Raises:
        ValueError: A setting is out of range, or they contradict each other.
    """

    alias: ClassVar[str] = "cs"

    def __init__(
        self,
        role: Role | None = None,
        server_host: str | None = None,
        server_port: int | None = None,
        n_runners: int = 1,
        graceful_timeout: float = 10.0,
        terminate_timeout: float = 10.0,
        main_process: MainProcess = "algorithm",
        managed_store: bool | None = None,
        allowed_exit_codes: Iterable[int] = (0, -signal.SIGTERM),
        store_url: str = "memory",
        restart_budget: int = 3,
        connect_timeout: float = 60.0,
        allow_insecure: bool = False,
        server_options: Mapping[str, Any] | None = None,
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.role: Role = _setting("role", role, _ROLE_VARIABLES, _read_role, "both")
        self.server_host = _setting("server_host", server_host, _variables("SERVER_HOST"), str, _DEFAULT_HOST)
        default_port = 0 if self.role == "both" else DEFAULT_PORT
        self.server_port = _setting("server_port", server_port, _variables("SERVER_PORT"), int, default_port)
        self.managed_store = _setting(
            "managed_store", managed_store, _variables("MANAGED_STORE"), _read_bool, True
        )
        self.n_runners = n_runners
        self.graceful_timeout = graceful_timeout
        self.terminate_timeout = terminate_timeout
        self.main_process: MainProcess = main_process
        self.allowed_exit_codes = frozenset(allowed_exit_codes)
        self.store_url = store_url
        self.restart_budget = restart_budget
        self.connect_timeout = connect_timeout
        self.allow_insecure = allow_insecure
        self.server_options = {"allow_insecure": allow_insecure, **(server_options or {})}
        self.client_options = {"allow_insecure": allow_insecure, **(client_options or {})}
        self._check()

    def _check(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, not {self.role!r}")
        if self.main_process not in get_args(MainProcess):
            raise ValueError(
                f"main_process must be one of {', '.join(get_args(MainProcess))}, not {self.main_process!r}"
            )
        if not 0 <= self.server_port <= 65535:
            raise ValueError(f"server_port must be from 0 to 65535, not {self.server_port}")
        if self.role == "runner" and self.server_port == 0:
            raise ValueError(
                "server_port=0 means 'pick one', which a runner that looks for a server cannot do"
            )
        if self.n_runners < 1:
            raise ValueError(f"n_runners must be at least 1, not {self.n_runners}")
        if self.role == "both" and self.main_process == "runner" and self.n_runners != 1:
            raise ValueError(
                f"main_process='runner' has room for one runner only, not n_runners={self.n_runners}"
            )
        for name in ("graceful_timeout", "terminate_timeout", "restart_budget", "connect_timeout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")

    def execute(
        self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore | None = None
    ) -> None:
        execution = _Execution(self, algorithm, runner, store)
        conduct = {
            ("both", "algorithm"): execution.algorithm_here,
            ("both", "runner"): execution.runner_here,
            ("algorithm", self.main_process): execution.algorithm_only,
            ("runner", self.main_process): execution.runners_only,
        }[self.role, self.main_process]
        execution.job.execute(conduct)


class _Execution:
    """One call of `execute`."""

    def __init__(
        self,
        settings: ClientServerExecutionStrategy,
        algorithm: AlgorithmBundle,
        runner: RunnerBundle,
        store: LightningStore | None,
    ) -> None:
        self.settings = settings
        self.algorithm = algorithm
        self.runner = runner
        self.event = MultiprocessingEvent()
        self.job = Job(
            self.event,
            graceful_timeout=settings.graceful_timeout,
            terminate_timeout=settings.terminate_timeout,
            drains=settings.role == "runner",
        )
        self.host = self._choose_host(store)

    def _choose_host(self, store: LightningStore | None) -> StoreHost:
        from lightning.rpc.client import LightningStoreClient
        from lightning.rpc.server import LightningStoreServer

        settings = self.settings
        host, port = settings.server_host, settings.server_port
        if store is not None:
            if (
                not settings.managed_store
                or settings.role == "runner"
                or isinstance(store, LightningStoreClient)
            ):
                return GivenStore(store)
            if isinstance(store, LightningStoreServer):
                return ServedStore(store, own=False)
            server = LightningStoreServer(LentStore(store), host, port, **settings.server_options)
            return ServedStore(server, own=True)
        if settings.role == "runner":
            return RemoteServer(f"{host}:{port}", settings.connect_timeout, settings.client_options)
        if not settings.managed_store:
            raise ValueError("managed_store=False needs a store: there would be none for the job")
        return ServerProcess(
            self.job, settings.store_url, host, port, settings.server_options, settings.client_options
        )

    def _fleet(self) -> RunnerFleet:
        prefix = os.environ.get(WORKER_PREFIX_VARIABLE)
        if not prefix:  # at a store that others use too, the names must be nobody else's
            prefix = "runner" if self.host.exclusive else f"{socket.gethostname()}-{os.getpid()}-runner"
        return RunnerFleet(
            self.job,
            self.host,
            self.runner,
            self.settings.n_runners,
            prefix=prefix,
            restart_budget=self.settings.restart_budget,
            allowed_exit_codes=self.settings.allowed_exit_codes,
        )

    # --- The forms of a job -----------------------------------------------------------------------------------------

    async def algorithm_here(self) -> None:
        """Role "both", the algorithm in this process."""
        fleet = self._fleet()
        async with contextlib.AsyncExitStack() as stack:
            await self._launch_host(stack)
            stack.push_async_callback(fleet.stop)
            fleet.launch()
            await self.job.unless_failed(self.host.start())
            fleet.release()
            watch = asyncio.create_task(fleet.ended())
            stack.callback(watch.cancel)
            await self.job.run_in_caller(lambda: self.algorithm(self.host.store, self.event))

    async def runner_here(self) -> None:
        """Role "both", the only runner in this process."""
        payload = Payload(
            functools.partial(run_algorithm, algorithm=self.algorithm, event=self.event), "the algorithm"
        )
        async with contextlib.AsyncExitStack() as stack:
            await self._launch_host(stack)
            child = ChildProcess(_ALGORITHM_NAME, payload)
            stack.push_async_callback(self._stop_algorithm, child)
            await self.job.unless_failed(self.host.start())
            watch = asyncio.create_task(self._tend_algorithm(child, self.host.pickled_store))
            stack.callback(watch.cancel)
            await self.job.run_in_caller(lambda: self.runner(self.host.store, 0, self.event))
            await self.job.unless_failed(first_of(child.exited, self.job.stopping))

    async def algorithm_only(self) -> None:
        """Role "algorithm"."""
        async with contextlib.AsyncExitStack() as stack:
            await self._launch_host(stack)
            await self.job.unless_failed(self.host.start())
            stack.push_async_callback(self._dismiss_runners)
            await self.job.run_in_caller(lambda: self.algorithm(self.host.store, self.event))

    async def runners_only(self) -> None:
        """Role "runner"."""
        fleet = self._fleet()
        async with contextlib.AsyncExitStack() as stack:
            await self._launch_host(stack)
            stack.push_async_callback(self._stop_fleet, fleet)
            fleet.launch()
            await self.job.unless_failed(self.host.start())
            fleet.release()
            # also for runners that connect too late to hear it themselves
            told = asyncio.create_task(hear_stop(self.host.store, fleet.prefix))
            stack.callback(told.cancel)
            ended = asyncio.create_task(fleet.ended())
            stack.callback(ended.cancel)
            await self.job.unless_failed(first_of(told, ended))
            if told.done():
                told.result()

    # --- Their parts -------------------------------------------------------------------------------------------------

    async def _launch_host(self, stack: contextlib.AsyncExitStack) -> None:
        stack.push_async_callback(self.host.stop)
        if isinstance(self.host, ServerProcess):
            self.host.launch()

    async def _stop_fleet(self, fleet: RunnerFleet) -> None:
        """SIGTERM is how a machine is taken out of service: what runs may finish. Ctrl-C is: now."""
        await fleet.stop(drain=self.job.signal == signal.SIGTERM)

    async def _tend_algorithm(self, child: ChildProcess, pickled_store: bytes) -> None:
        await first_of(child.loaded, child.exited)
        child.send(pickled_store)
        await asyncio.wait({child.exited})
        if child.finished:
            self.event.set()
            await self.host.tell_runners(Stop(reason="the algorithm is done"))
        else:
            self.job.fail(child.error())

    async def _stop_algorithm(self, child: ChildProcess) -> None:
        self.event.set()
        if self.job.failure.done():
            child.signal(signal.SIGINT)
        await stop_children(self.job, [child], wait_first=child.loaded.done() and self.host.alive)

    async def _dismiss_runners(self) -> None:
        """Tell the runners elsewhere that it is over, and let them report before the server goes."""
        if not self.host.alive:
            return
        told = asyncio.ensure_future(self._see_runners_off())
        await self.job.pause(told, min(self.settings.graceful_timeout, _FAREWELL_SECONDS))
        if not told.done():
            told.cancel()
        elif (error := told.exception()) is not None:  # the store is gone, and whoever was there knows it
            logger.warning("the runners could not be seen off: %s: %s", type(error).__name__, error)

    async def _see_runners_off(self) -> None:
        """Tell them, and wait until each has sent the last heartbeat, which is the last thing a runner does."""
        before = await self._heartbeats()
        await self.host.tell_runners(Stop(reason="the algorithm is done"))
        while self.host.exclusive:
            now = await self._heartbeats()
            if not any(
                busy or heard == before.get(name, (0, heard))[1] for name, (busy, heard) in now.items()
            ):
                return
            await asyncio.sleep(_FAREWELL_POLL_SECONDS)

    async def _heartbeats(self) -> dict[str, tuple[bool, float]]:
        """By worker that is thought to be alive: whether it is busy, and when it was last heard."""
        workers = await self.host.store.query_workers(status_in=["busy", "idle"])
        return {
            worker.worker_id: (worker.status == "busy", worker.last_heartbeat_time)
            for worker in workers
            if worker.last_heartbeat_time is not None
        }


# --- Settings from the environment -----------------------------------------------------------------------------------


def _variables(name: str) -> tuple[str, ...]:
    return tuple(prefix + name for prefix in _VARIABLE_PREFIXES)


def _setting(name: str, given: T | None, variables: Iterable[str], read: Callable[[str], T], default: T) -> T:
    """The argument, else the first of the environment's variables that is set, else the default."""
    if given is not None:
        return given
    for variable in variables:
        text = os.environ.get(variable, "").strip()
        if text:
            try:
                return read(text)
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} cannot be used as {name}: {error}") from None
    return default


def _read_role(text: str) -> Role:
    if text not in get_args(Role):
        raise ValueError(f"it must be one of {', '.join(get_args(Role))}")
    return cast(Role, text)


def _read_bool(text: str) -> bool:
    values: dict[str, Any] = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return bool(values[text.lower()])
    except KeyError:
        raise ValueError(f"it must be one of {', '.join(values)}") from None
