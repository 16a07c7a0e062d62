"""Training: algorithms, adapters, and the trainer that runs them."""

from __future__ import annotations

from lightning.training.adapter import Adapter, Conversation, TraceToMessages, TraceToTriplets, Triplet
from lightning.training.algorithm import Algorithm, Dataset, SinglePass
from lightning.training.trainer import Trainer

__all__ = [
    "Adapter",
    "Algorithm",
    "Conversation",
    "Dataset",
    "SinglePass",
    "TraceToMessages",
    "TraceToTriplets",
    "Trainer",
    "Triplet",
]
