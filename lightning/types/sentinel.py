"""`UNSET`: how a partial update says "leave this field alone", as opposed to `None`, which says "clear it"."""

from __future__ import annotations

import enum
from typing import Literal


class Unset(enum.Enum):
    """The type of `UNSET`. An enum member is a singleton that survives pickling and narrows in type checkers."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> Literal[False]:
        return False


UNSET = Unset.UNSET
"""Default of every optional field of an update: the stored value stays as it is."""
