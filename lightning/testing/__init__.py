"""For those who test a store, ours or one of their own: the contract as a test suite, and time that stands still.

Needs pytest and hypothesis: `pip install "agent-lightning-grpc[test]"`. See `docs/testing-a-store.md`.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("lightning.testing.contract")

from lightning.testing.clock import FakeClock  # noqa: E402  # after the line above, which it concerns
from lightning.testing.contract import (  # noqa: E402
    ClockedStoreContractSuite,
    EvictionContract,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
    StoreContractSuite,
    StoreTheme,
)
from lightning.testing.records import make_span  # noqa: E402

__all__ = [
    "ClockedStoreContractSuite",
    "EvictionContract",
    "FakeClock",
    "LaxResourcesContract",
    "ResumedWatchContract",
    "RunnerContract",
    "StoreContractSuite",
    "StoreTheme",
    "make_span",
]
