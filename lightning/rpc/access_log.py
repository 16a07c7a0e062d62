"""The access log: one line for each call that has ended, with neither tokens nor payloads."""

from __future__ import annotations

import logging
import re

from lightning.rpc.interception import Call

ACCESS_LOGGER = "lightning.access"
"""The name of the logger; at level INFO."""

_PLAIN = re.compile(r"[\w.@-]{1,100}", re.ASCII)

logger = logging.getLogger(ACCESS_LOGGER)


class AccessLog:
    """Writes the access log."""

    def begun(self, call: Call) -> None:
        """Nothing is said before the end."""

    def ended(self, call: Call) -> None:
        """Say what came of a call."""
        logger.info(
            "%s peer=%s token=%s certificate=%s code=%s seconds=%.6f in=%d out=%d",
            call.method,
            call.peer,
            "-" if call.caller is None else call.caller.name,
            _printable(call.certificate_name),
            call.code.name,
            call.seconds,
            call.received_bytes,
            call.sent_bytes,
        )


def _printable(name: str | None) -> str:
    """A name that somebody else chose, such that it can neither break a line nor feign a field."""
    if name is None:
        return "-"
    return name if _PLAIN.fullmatch(name) else repr(name[:100]).replace(" ", "\\x20")
