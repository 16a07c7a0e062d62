"""Bearer tokens: making them, and the file in which a server finds whom it knows.

A token is 256 random bits, shown once, to whoever makes it. The file has only its SHA-256, which says nothing about it
(there is nothing to guess, so a slow hash would add nothing), beside a name for people, a role, and when it ends:

    {"tokens": [{"name": "nightly", "role": "runner", "sha256": "…", "created": "…", "expires": null}]}
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Role = Literal["viewer", "runner", "algorithm"]

_PREFIX = "ltk_"
"""By which scanners for leaked secrets, and people, know what it is."""
_RANDOM_BYTES = 32


class TokenEntry(BaseModel):
    """What the file says about one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    """What people and logs call it; no two in a file have the same."""
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime
    expires: datetime | None = None
    """When it ends; None: never."""

    def expired(self, now: float) -> bool:
        """Whether it has ended. `now` is in seconds since the epoch."""
        return self.expires is not None and self.expires.timestamp() <= now


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: list[TokenEntry]


def make_token() -> str:
    """A new secret."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest(token: str) -> str:
    """What the file keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: str | Path) -> list[TokenEntry]:
    """What the file says. Raises `ValueError` if it cannot be read; the message says why, and nothing of a token."""
    try:
        content = _Content.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"the token file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"the token file {path} is malformed{place and f' at {place}'}: {first['msg']}"
        ) from None
    names = [entry.name for entry in content.tokens]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the token file {path} is malformed: two tokens are called {twice!r}")
    return content.tokens


def add_token(
    path: Path, role: Role, name: str | None, lifetime_seconds: float | None
) -> tuple[str, TokenEntry]:
    """Make a token and enter it in the file, which is made if there is none.

    Args:
        path: The file.
        role: What it is good for.
        name: Its name; None picks one.
        lifetime_seconds: When it ends; None: never.

    Returns:
        The token, which nobody can find out again, and its entry.

    Raises:
        ValueError: The name is taken or malformed, or the file cannot be read.
        OSError: The file cannot be written.
    """
    token = make_token()
    created = time.time()
    expires = None if lifetime_seconds is None else _moment(created + lifetime_seconds)
    with _changing(path) as tokens:
        name = f"{role}-{secrets.token_hex(3)}" if name is None else name
        if any(entry.name == name for entry in tokens):
            raise ValueError(f"{path} has a token called {name!r} already; revoke it, or choose another name")
        try:
            entry = TokenEntry(
                name=name, role=role, sha256=digest(token), created=_moment(created), expires=expires
            )
        except ValidationError:
            raise ValueError(
                f"a token cannot be called {name!r}: use 1 to 64 letters, digits and any of . _ @ -"
            ) from None
        tokens.append(entry)
    return token, entry


def revoke_token(path: Path, name: str) -> None:
    """Take a token out of the file. Raises `ValueError` if there is none of that name."""
    with _changing(path, must_exist=True) as tokens:
        kept = [entry for entry in tokens if entry.name != name]
        if len(kept) == len(tokens):
            raise ValueError(f"{path} has no token called {name!r}")
        tokens[:] = kept


@contextlib.contextmanager
def _changing(path: Path, *, must_exist: bool = False) -> Iterator[list[TokenEntry]]:
    """The entries, to be changed in place; written when the block ends well, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of two at a time, neither loses what the other wrote
        tokens = read_tokens(path) if must_exist or path.exists() else []
        yield tokens
        _write(path, tokens)
    finally:
        os.close(folder)


def _write(path: Path, tokens: Sequence[TokenEntry]) -> None:
    content = json.dumps({"tokens": [entry.model_dump(mode="json") for entry in tokens]}, indent=2) + "\n"
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner's eyes only
    os.close(number)
    temporary = Path(name)
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), timezone.utc)
