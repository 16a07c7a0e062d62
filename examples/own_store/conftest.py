"""Lets the test module find the store beside it, however pytest is told to import."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
