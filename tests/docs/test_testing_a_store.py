"""What `docs/testing-a-store.md` shows is what is there, and works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_store"


def python_blocks() -> list[str]:
    """The Python that the page shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "testing-a-store.md").read_text(), re.DOTALL)


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as a user would, outside this repository's settings."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        folder,
        *arguments,
        folder,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=55, check=False)


def test_the_worked_example_is_the_one_that_is_tested() -> None:
    assert python_blocks()[0] == (EXAMPLE / "test_plain_store.py").read_text()


def test_the_worked_example_passes_by_itself() -> None:
    ran = run_pytest(EXAMPLE, "-k", "queue or claim or oldest")
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) > 20  # type: ignore[union-attr]


def test_the_machine_as_shown_runs(tmp_path: Path) -> None:
    (machine,) = (block for block in python_blocks() if "StoreMachine" in block)
    header = f"import sys\nsys.path.append({str(EXAMPLE)!r})\nfrom plain_store import PlainStore\n"
    (tmp_path / "test_mine.py").write_text(header + machine)
    ran = run_pytest(tmp_path)
    assert ran.returncode == 0, ran.stdout


def test_an_overridden_test_is_marked_as_shown(tmp_path: Path) -> None:
    (override,) = (block for block in python_blocks() if "xfail" in block)
    shown = python_blocks()[0].replace(
        "from plain_store", f"import sys\nsys.path.append({str(EXAMPLE)!r})\nfrom plain_store"
    )
    shown = shown.replace("import pytest\n", "import pytest\nfrom lightning import LightningStore\n", 1)
    (tmp_path / "test_mine.py").write_text(shown + "\n" + override)
    ran = run_pytest(tmp_path, "-k", "InRealTime and test_rollouts_sorted")
    assert "1 xpassed" in ran.stdout, ran.stdout
