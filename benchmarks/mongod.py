"""The MongoDB server that the tests run on, for the benchmark."""

from __future__ import annotations

import importlib.util
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.servers import ROOT, scratch


@contextmanager
def mongod() -> Iterator[str | None]:
    """A replica set of one member; its host and port. None where there is no MongoDB to run."""
    tests = _tests()
    try:
        tests.find_binary()
    except tests.MongodMissing:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        server = tests.Mongod(Path(folder) / "mongod", replica_set=True)
        try:
            server.start()
            server.initiate()
            yield server.host
        finally:
            server.stop()


def fresh_url(host: str) -> str:
    """A store there that nobody has used."""
    return f"mongodb://{host}/bench?directConnection=true#{uuid.uuid4().hex}"


def _tests() -> Any:
    spec = importlib.util.spec_from_file_location(
        "tests_mongo_server", ROOT / "tests" / "mongo" / "server.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
