"""A store that is none of the family."""

from __future__ import annotations

from lightning.store.contract import LightningStore


class Stranger:
    """Has a store's methods, and nothing else in common with `LightningStore`.

    Args:
        store: Does the work.
    """

    def __init__(self, store: LightningStore) -> None:
        for verb in ("close", *LightningStore.__abstractmethods__):
            setattr(self, verb, getattr(store, verb))
