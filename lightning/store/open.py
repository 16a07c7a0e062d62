"""Opening a store by its name, for command lines, settings and processes that are told where to find theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.store.backends import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.contract import LightningStore


def default_path() -> Path:
    """The file of the store `sqlite`: in the user's data folder, as the XDG Base Directory Specification has it."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "agent-lightning" / "store.db"


def _open_memory(rest: str) -> LightningStore:
    if rest:
        raise ValueError(f"the store 'memory' takes nothing after its name, not {rest!r}")
    return InMemoryLightningStore()


def _open_sqlite(rest: str) -> LightningStore:
    if rest:
        return SQLiteLightningStore(rest)
    default_path().parent.mkdir(parents=True, exist_ok=True)
    return SQLiteLightningStore(default_path())


_BACKENDS: Mapping[str, tuple[str, Callable[[str], LightningStore]]] = {
    "memory": ("memory", _open_memory),
    "sqlite": ("sqlite, sqlite:PATH", _open_sqlite),
}
"""By scheme: what a user writes, and what opens it, given what follows the scheme."""


def full_url(url: str) -> str:
    """`url` with what it leaves to the defaults."""
    return f"sqlite:{default_path()}" if url.rstrip(":") == "sqlite" else url


def is_store_url(text: str) -> bool:
    """Whether `text` begins as the URL of a store does."""
    return text.partition(":")[0] in _BACKENDS


def open_store(url: str) -> LightningStore:
    """Open the store that `url` names.

    Args:
        url: `memory`: a new store in the memory of this process. `sqlite:PATH`: the store in that file, made if there
            is none; `sqlite`: in the file `default_path()`.

    Raises:
        ValueError: There is no such kind of store, or its name is incomplete.
    """
    scheme, _, rest = url.partition(":")
    if not is_store_url(url):
        forms = ", ".join(form for form, _ in _BACKENDS.values())
        raise ValueError(f"unknown store {url!r}; a store is one of: {forms}")
    return _BACKENDS[scheme][1](rest)
