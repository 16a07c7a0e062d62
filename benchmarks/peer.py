"""The peer: agentlightning from PyPI, in an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.servers import CACHE, run

PEER = "agentlightning==0.3.0"
_PINS = (
    PEER,
    "opentelemetry-api==1.39.1",
    "opentelemetry-sdk==1.39.1",
    "opentelemetry-exporter-otlp==1.39.1",
    "opentelemetry-instrumentation==0.60b1",
)
"""Newer ones do not fit it."""


async def environment() -> Path:
    """Its virtual environment; made now if it is not there, which takes some minutes."""
    folder = CACHE / "peer"
    complete = folder / "installed"
    wanted = "\n".join((*_PINS, sys.version))
    if not complete.exists() or complete.read_text("utf-8") != wanted:
        await run(sys.executable, "-m", "venv", "--clear", str(folder))
        await run(str(folder / "bin" / "pip"), "install", "--quiet", *_PINS)
        complete.write_text(wanted, "utf-8")
    return folder
