"""The contract suite, theme by theme, and put together."""

from __future__ import annotations

from lightning.testing.contract.attempts import AttemptContract, CancelContract
from lightning.testing.contract.queue import QueueContract
from lightning.testing.contract.resources import ResourcesContract
from lightning.testing.contract.rollouts import RolloutContract
from lightning.testing.contract.sequence_ids import SequenceIdContract
from lightning.testing.contract.spans import SpanContract
from lightning.testing.contract.updates import UpdateContract


class StoreContractSuite(
    RolloutContract,
    QueueContract,
    AttemptContract,
    CancelContract,
    UpdateContract,
    SpanContract,
    SequenceIdContract,
    ResourcesContract,
):
    """x"""
