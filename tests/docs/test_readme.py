"""What the README shows is what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_first_agent_is_the_example_and_runs(tmp_path: Path) -> None:
    shown = re.search(
        r"```python\n(import lightning as lt\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert shown is not None
    assert shown.group(1) == (ROOT / "examples" / "first_agent.py").read_text()
    copied = tmp_path / "mine.py"
    copied.write_text(shown.group(1))
    ran = subprocess.run(
        [sys.executable, copied], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "{number} is odd: mean reward 0.75",
        "{number} is even: mean reward 0.25",
    ]
