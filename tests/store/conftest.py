"""The example of a store of one's own is the foreign store of these tests; it stands outside the package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "own_store"))
