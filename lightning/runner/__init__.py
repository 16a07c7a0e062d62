"""Executing rollouts: the runner, its hooks and its heartbeat."""

from __future__ import annotations

from lightning.agents import Agent, rollout
from lightning.runner.agent import AgentRunner
from lightning.runner.hooks import Hook
from lightning.runner.snapshot import system_snapshot
from lightning.runner.threads import AgentInterrupted

__all__ = ["Agent", "AgentInterrupted", "AgentRunner", "Hook", "rollout", "system_snapshot"]
