"""What all records are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

_FIELDS_SET = "__pydantic_fields_set__"


class Record(BaseModel):
    """A model that makes the set of its fields that were set when somebody asks for it, unless there is one already.

    Records that come from a store have all of their fields set, and hardly anybody asks. For a span the four sets would
    take 2 KB, and the garbage collector would walk through them again and again.
    """

    if not TYPE_CHECKING:  # as in pydantic: or else any attribute would be right

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there."""
            if name != _FIELDS_SET:
                return super().__getattr__(name)
            fields_set = set(type(self).model_fields)
            object.__setattr__(self, _FIELDS_SET, fields_set)
            return fields_set
