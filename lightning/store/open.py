"""Opening a store by its name, for command lines, settings and processes that are told where to find theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning.store.backends import InMemoryLightningStore
from lightning.store.contract import LightningStore


def _open_memory(rest: str) -> LightningStore:
    if rest:
        raise ValueError(f"the store 'memory' takes nothing after its name, not {rest!r}")
    return InMemoryLightningStore()


_BACKENDS: Mapping[str, tuple[str, Callable[[str], LightningStore]]] = {
    "memory": ("memory", _open_memory),
}
"""By scheme: what a user writes, and what opens it, given what follows the scheme."""


def open_store(url: str) -> LightningStore:
    """Open the store that `url` names.

    Args:
        url: `memory`: a new store in the memory of this process.

    Raises:
        ValueError: There is no such kind of store, or its name is incomplete.
    """
    scheme, _, rest = url.partition(":")
    if scheme not in _BACKENDS:
        forms = ", ".join(form for form, _ in _BACKENDS.values())
        raise ValueError(f"unknown store {url!r}; a store is one of: {forms}")
    return _BACKENDS[scheme][1](rest)
