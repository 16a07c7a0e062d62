"""A store server on MongoDB is killed under load: a short form of `scripts/prove_mongo.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prove_mongo.py"


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("_mongod_is_there")
def test_what_a_killed_server_had_acknowledged_is_there() -> None:
    proof = subprocess.run(
        [sys.executable, SCRIPT, "--only", "kills", "--kills", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert proof.stdout.splitlines()[-1] == "nothing lost, nothing twice"
