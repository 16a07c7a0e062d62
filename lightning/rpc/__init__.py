"""The store over gRPC: `LightningStoreServer`, `LightningStoreClient`, and the errors that only a remote store
raises."""

from __future__ import annotations

from lightning.rpc.client import LightningStoreClient
from lightning.rpc.errors import (
    LimitExceededError,
    OverloadedError,
    PermissionDenied,
    RemoteStoreError,
    StoreDrainingError,
    StoreInternalError,
    StoreUnavailableError,
    Unauthenticated,
    UntrustedServerError,
)
from lightning.rpc.server import LightningStoreServer

__all__ = [
    "LightningStoreClient",
    "LightningStoreServer",
    "LimitExceededError",
    "OverloadedError",
    "PermissionDenied",
    "RemoteStoreError",
    "StoreDrainingError",
    "StoreInternalError",
    "StoreUnavailableError",
    "Unauthenticated",
    "UntrustedServerError",
]
