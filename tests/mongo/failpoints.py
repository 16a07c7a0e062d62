"""Making a real MongoDB fail: the failpoint `failCommand` of its test mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pymongo
from server import Mongod


class Failpoint:
    """Lets commands of stores fail.

    Args:
        server: Whose.
        commands: Which, by the names that MongoDB has for them.
        how: What happens: `errorCode`, `writeConcernError` (the command has had its effect) or `closeConnection`.
    """

    def __init__(self, server: Mongod, commands: Sequence[str], **how: Any) -> None:
        self._client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(server.uri)
        self._data = {"failCommands": list(commands), "appName": "lightning-store", **how}

    def set(self, mode: Any) -> None:
        """`"alwaysOn"`, `"off"` or `{"times": n}`: the next so many commands."""
        self._client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": self._data})

    def close(self) -> None:
        """No command fails any more."""
        self._client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
        self._client.close()


@contextmanager
def failing(server: Mongod, commands: Sequence[str], **how: Any) -> Iterator[Failpoint]:
    """Until then, these commands of all stores fail in this way."""
    failpoint = Failpoint(server, commands, **how)
    try:
        failpoint.set("alwaysOn")
        yield failpoint
    finally:
        failpoint.close()
