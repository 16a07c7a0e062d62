"""Opening a store by its name, for command lines, settings and processes that are told where to find theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.store.backends import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.contract import LightningStore
from lightning.store.mongo import open_mongo, without_password
from lightning.store.persistence.sqlite import IN_MEMORY


def default_path() -> Path:
    """The file of the store `sqlite`: in the user's data folder, as the XDG Base Directory Specification has it."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "agent-lightning" / "store.db"


def _open_memory(rest: str) -> LightningStore:
    if rest:
        raise ValueError(f"the store 'memory' takes nothing after its name, not {rest!r}")
    return InMemoryLightningStore()


def _open_sqlite(rest: str, **options: Any) -> LightningStore:
    if rest:
        return SQLiteLightningStore(rest, **options)
    default_path().parent.mkdir(parents=True, exist_ok=True)
    return SQLiteLightningStore(default_path(), **options)


def _open_mongodb(rest: str, **options: Any) -> LightningStore:
    return open_mongo(f"mongodb:{rest}", **options)


def _open_mongodb_srv(rest: str, **options: Any) -> LightningStore:
    return open_mongo(f"mongodb+srv:{rest}", **options)


@dataclass(frozen=True)
class _Backend:
    form: str
    """What a user writes."""
    open: Callable[..., LightningStore]
    """Given what follows the scheme, and options by name."""
    options: tuple[str, ...] = ()
    """Those that it takes."""
    shared: bool = False
    """Whether several processes may work on one such store."""


_BACKENDS: Mapping[str, _Backend] = {
    "memory": _Backend("memory", _open_memory),
    "sqlite": _Backend("sqlite, sqlite:PATH", _open_sqlite, ("durability", "retain")),
    "mongodb": _Backend("mongodb://HOSTS/DATABASE", _open_mongodb, ("retain",), shared=True),
    "mongodb+srv": _Backend("mongodb+srv://HOST/DATABASE", _open_mongodb_srv, ("retain",), shared=True),
}
"""By scheme."""


def full_url(url: str) -> str:
    """`url` with what it leaves to the defaults, and without a password, for people to read."""
    return f"sqlite:{default_path()}" if url.rstrip(":") == "sqlite" else without_password(url)


def sqlite_path(url: str) -> Path | None:
    """The file of the store that `url` names; None if it is in none. Raises `ValueError` for what is no store's URL."""
    scheme, _, rest = url.partition(":")
    _backend_of(url)
    if scheme != "sqlite" or rest == IN_MEMORY:
        return None
    return Path(rest).expanduser() if rest else default_path()


def is_shared(url: str) -> bool:
    """Whether several processes may work on the store that `url` names. Raises `ValueError` if it names none."""
    return _backend_of(url).shared


def is_store_url(text: str) -> bool:
    """Whether `text` begins as the URL of a store does."""
    return text.partition(":")[0] in _BACKENDS


def open_store(
    url: str, *, durability: str | None = None, retain: str | Sequence[str] | None = None
) -> LightningStore:
    """Open the store that `url` names.

    Args:
        url: `memory`: a new store in the memory of this process. `sqlite:PATH`: the store in that file, made if there
            is none; `sqlite`: in the file `default_path()`. `mongodb://…`: the store in that MongoDB database, see
            `open_mongo`.
        durability: See `SQLiteLightningStore`; None: its default.
        retain: See `SQLiteLightningStore` and `MongoLightningStore`; None: everything.

    Raises:
        ValueError: There is no such kind of store, its name is incomplete, or it does not take such an option.
        ImportError: What it needs is not installed.
    """
    scheme, _, rest = url.partition(":")
    backend = _backend_of(url)
    given = {"durability": durability, "retain": retain}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in backend.options:
            raise ValueError(f"the store {scheme!r} takes no {name}")
    return backend.open(rest, **options)


def _backend_of(url: str) -> _Backend:
    if not is_store_url(url):
        forms = ", ".join(backend.form for backend in _BACKENDS.values())
        raise ValueError(f"unknown store {url!r}; a store is one of: {forms}")
    return _BACKENDS[url.partition(":")[0]]
