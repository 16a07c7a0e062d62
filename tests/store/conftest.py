"""Makes importable: what stands beside these tests, and the example of a store of one's own, their foreign store."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[2] / "examples" / "own_store"):
    sys.path.append(str(folder))
