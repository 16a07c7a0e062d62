"""`python -m lightning`: the command line, where the console script is not on the path."""

from __future__ import annotations

from lightning.cli import main

main()
