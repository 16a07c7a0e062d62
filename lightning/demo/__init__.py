"""The demo: one command that trains a policy on CartPole through the gRPC control plane.

`policy.py` is the mathematics, `plan.py` the course of the training, `episodes.py` the agent that plays and the
adapter that reads its episodes back, `algorithm.py` the training loop, `view.py` what a person sees.
Needs the extra `demo` (numpy, gymnasium, matplotlib).
"""

from __future__ import annotations

from lightning.demo.episodes import agent

__all__ = ["agent"]
