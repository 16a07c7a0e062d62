"""The proof of endings, in short: cells that want a program of two, a kill, and a look into the store's file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prove_endings.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--only", *words],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


@pytest.mark.parametrize("words", [("roles apart", "kill -9 of the server"), ("shm", "agent raises")])
def test_a_cell_of_the_matrix_of_endings(words: tuple[str, ...]) -> None:
    outcome = run(*words)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "│ ok " in outcome.stdout


def test_there_must_be_such_a_cell() -> None:
    outcome = run("shm", "kill -9 of the server")  # there is none
    assert outcome.returncode == 2
    assert "no cell has these words in its name" in outcome.stderr
