"""The contract suite: themes, and the suites they make up.

Every theme is a class of tests that take a `store` fixture. No two have a test of the same name, so any of them can be
put together in one class.
"""

from __future__ import annotations

from lightning.testing.contract.attempts import AttemptContract, CancelContract
from lightning.testing.contract.base import ClockedTheme, StoreTheme
from lightning.testing.contract.deadlines import DeadlineContract, WaitLimitContract
from lightning.testing.contract.heartbeats import HeartbeatContract, RunnerContract
from lightning.testing.contract.options import EvictionContract, LaxResourcesContract
from lightning.testing.contract.otel import OpenTelemetryContract
from lightning.testing.contract.payloads import PayloadContract
from lightning.testing.contract.queries import (
    AttemptQueryContract,
    ResourcesQueryContract,
    RolloutQueryContract,
    SpanQueryContract,
    WorkerQueryContract,
)
from lightning.testing.contract.queue import QueueContract
from lightning.testing.contract.realtime import RealTimeContract
from lightning.testing.contract.resources import ResourcesContract
from lightning.testing.contract.rollouts import RolloutContract
from lightning.testing.contract.sequence_ids import SequenceIdContract
from lightning.testing.contract.spans import SpanContract
from lightning.testing.contract.updates import UpdateContract
from lightning.testing.contract.waiting import WaitingContract
from lightning.testing.contract.watching import ResumedWatchContract, WatchContract
from lightning.testing.contract.workers import WorkerContract


class TimelessContractSuite(
    RolloutContract,
    QueueContract,
    AttemptContract,
    CancelContract,
    UpdateContract,
    SpanContract,
    SequenceIdContract,
    OpenTelemetryContract,
    ResourcesContract,
    RolloutQueryContract,
    AttemptQueryContract,
    SpanQueryContract,
    ResourcesQueryContract,
    WorkerQueryContract,
    PayloadContract,
    WorkerContract,
    WaitingContract,
    WatchContract,
):
    """All of the contract that holds while no time passes: what the two suites have in common."""


class StoreContractSuite(TimelessContractSuite, RealTimeContract):
    """The contract, for a store that has its own idea of time."""


class ClockedStoreContractSuite(
    TimelessContractSuite, DeadlineContract, WaitLimitContract, HeartbeatContract
):
    """The contract, for a store that can be given the fixture `clock`: exact in every question of time."""


__all__ = [
    "AttemptContract",
    "AttemptQueryContract",
    "CancelContract",
    "ClockedStoreContractSuite",
    "ClockedTheme",
    "DeadlineContract",
    "EvictionContract",
    "HeartbeatContract",
    "LaxResourcesContract",
    "OpenTelemetryContract",
    "PayloadContract",
    "QueueContract",
    "RealTimeContract",
    "ResourcesContract",
    "ResourcesQueryContract",
    "ResumedWatchContract",
    "RolloutContract",
    "RolloutQueryContract",
    "RunnerContract",
    "SequenceIdContract",
    "SpanContract",
    "SpanQueryContract",
    "StoreContractSuite",
    "StoreTheme",
    "TimelessContractSuite",
    "UpdateContract",
    "WaitLimitContract",
    "WaitingContract",
    "WatchContract",
    "WorkerContract",
    "WorkerQueryContract",
]
