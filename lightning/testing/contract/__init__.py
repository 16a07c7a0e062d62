"""The contract suite, theme by theme, and put together."""

from __future__ import annotations

from lightning.testing.contract.attempts import AttemptContract, CancelContract
from lightning.testing.contract.payloads import PayloadContract
from lightning.testing.contract.queries import (
    AttemptQueryContract,
    ResourcesQueryContract,
    RolloutQueryContract,
    SpanQueryContract,
    WorkerQueryContract,
)
from lightning.testing.contract.queue import QueueContract
from lightning.testing.contract.resources import ResourcesContract
from lightning.testing.contract.rollouts import RolloutContract
from lightning.testing.contract.sequence_ids import SequenceIdContract
from lightning.testing.contract.spans import SpanContract
from lightning.testing.contract.updates import UpdateContract
from lightning.testing.contract.waiting import WaitingContract
from lightning.testing.contract.workers import WorkerContract


class StoreContractSuite(
    RolloutContract,
    QueueContract,
    AttemptContract,
    CancelContract,
    UpdateContract,
    SpanContract,
    SequenceIdContract,
    ResourcesContract,
    RolloutQueryContract,
    AttemptQueryContract,
    SpanQueryContract,
    ResourcesQueryContract,
    WorkerQueryContract,
    PayloadContract,
    WorkerContract,
    WaitingContract,
):
    """x"""
