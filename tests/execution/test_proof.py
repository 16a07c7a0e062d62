"""The proofs of what becomes of jobs and runners, in short: cells and rows that want real processes and kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("roles apart", "kill -9 of the server"),
        ("shm", "agent raises"),
        ("module", "normal end"),
        ("notebook", "Ctrl-C once"),
    ],
)
def test_a_cell_of_the_matrix_of_endings(words: tuple[str, ...]) -> None:
    outcome = run("prove_endings.py", "--only", *words)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "│ ok " in outcome.stdout


def test_there_must_be_such_a_cell() -> None:
    outcome = run("prove_endings.py", "--only", "shm", "kill -9 of the server")  # there is none
    assert outcome.returncode == 2
    assert "no cell has these words in its name" in outcome.stderr


def test_others_take_over_from_a_machine_that_dies() -> None:
    """How soon is for the proof at length, on a quiet machine; here it is that, and that nothing is executed twice."""
    outcome = run("prove_runners.py", "--lease", "1", "--rollouts", "1", "--only", "machine's death")
    assert "FAILED" not in outcome.stdout, outcome.stdout + outcome.stderr
    assert " max " in outcome.stdout, outcome.stdout + outcome.stderr


def test_random_deaths_leave_each_rollout_in_one_terminal_state() -> None:
    outcome = run("prove_fleet.py", "--seconds", "3", "--runners", "6", "--processes", "2", "--pace", "0.1")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "rollouts succeeded" in outcome.stdout
