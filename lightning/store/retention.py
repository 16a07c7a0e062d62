"""For how long finished rollouts are kept, or in how much room."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BYTES = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


@dataclass(frozen=True)
class Retention:
    """What is kept of finished rollouts and their spans; those that ended first go first.

    Unfinished rollouts, resources and workers are always kept.
    """

    seconds: float | None = None
    """How long after its end a rollout may be dropped; None: never for its age."""
    size_bytes: int | None = None
    """How much room everything together may take before rollouts are dropped; None: any."""
    text: str = ""
    """As it was asked for, to be shown to people."""

    @classmethod
    def of(cls, given: str | Sequence[str]) -> Retention:
        """Read `"7d"`, `"10GB"`, or both. Raises `ValueError` for anything else."""
        amounts = [given] if isinstance(given, str) else list(given)
        seconds: float | None = None
        size_bytes: int | None = None
        for amount in amounts:
            number, unit = _split(amount)
            if unit in _SECONDS and seconds is None:
                seconds = number * _SECONDS[unit]
            elif unit in _BYTES and size_bytes is None:
                size_bytes = int(number * _BYTES[unit])
            else:
                raise ValueError(f"retain says {amount!r} beside another amount of the same kind")
        if not amounts:
            raise ValueError("retain names neither an age nor a size")
        return cls(seconds, size_bytes, " and ".join(amounts))


def _split(amount: str) -> tuple[float, str]:
    found = _AMOUNT.fullmatch(amount.strip()) if isinstance(amount, str) else None
    number, unit = (float(found[1]), found[2]) if found else (0.0, "")
    if number <= 0 or unit not in {**_SECONDS, **_BYTES}:
        raise ValueError(
            f"retain must be an age such as 7d (units: {', '.join(_SECONDS)}) or a size such as 10GB (units: "
            f"{', '.join(_BYTES)}), not {amount!r}"
        )
    return number, unit
