"""For those who test a store, ours or one of their own."""

from __future__ import annotations

from lightning.testing.clock import FakeClock

__all__ = ["FakeClock"]
