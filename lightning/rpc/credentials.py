"""What a client shows a server, and asks of it: TLS and a token, from arguments, the environment, and the address."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from lightning.rpc.address import Endpoint
from lightning.rpc.followed import Followed
from lightning.rpc.security import AUTHORIZATION_KEY
from lightning.rpc.tls import ClientTls

_TOKEN = re.compile(r"[\x21-\x7e]+")

Metadata = tuple[tuple[str, str], ...]
FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Credentials:
    """How a client connects. Pickled, it takes the paths along, and the token; printed, it does not show that."""

    tls: ClientTls | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None

    def open_channel(self, endpoint: Endpoint, options: tuple[tuple[str, Any], ...]) -> grpc.aio.Channel:
        """A channel to `endpoint`. Raises `ValueError` if a file is of no use."""
        if self.tls is None:
            return grpc.aio.insecure_channel(endpoint.target, options=options)
        return grpc.aio.secure_channel(
            endpoint.target, self.tls.credentials(), options=(*options, *self.tls.channel_options())
        )

    def metadata(self) -> Callable[[], Metadata | None]:
        """What gives the metadata of each call, at the time of the call."""
        if self.token_file is not None:
            path = self.token_file
            followed = Followed([path], lambda: _bearer(_read_token(path)))
            return followed.value
        fixed = None if self.token is None else _bearer(self.token)
        return lambda: fixed


PLAIN = Credentials()
"""Nothing is encrypted, and no token shown."""


def find_credentials(
    endpoint: Endpoint,
    *,
    tls_ca: FilePath | None = None,
    tls_cert: FilePath | None = None,
    tls_key: FilePath | None = None,
    tls_server_name: str | None = None,
    token: str | None = None,
    token_file: FilePath | None = None,
    allow_insecure: bool = False,
) -> Credentials:
    """What to connect to `endpoint` with. What is not given is looked for in the environment: `LIGHTNING_TOKEN`,
    `LIGHTNING_TOKEN_FILE`, and for connections by TLS `LIGHTNING_TLS_CA`, `LIGHTNING_TLS_CERT`, `LIGHTNING_TLS_KEY`.

    The connection is by TLS if the address says so, or a setting of TLS is given. The environment alone never makes it
    so: a job's own server on this machine is another one than that which the variables are for.

    Raises:
        ValueError: The settings contradict each other or the address, a file is of no use, or the token would be sent
            unencrypted to another machine.
    """
    given = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key, "tls_server_name": tls_server_name}
    named = next((name for name, value in given.items() if value is not None), None)
    if named is not None and endpoint.secure is False:
        raise ValueError(
            f"{named} is given, but the address asks for a connection without TLS; write grpcs://"
        )
    if token is None and token_file is None:
        token = os.environ.get("LIGHTNING_TOKEN", "").strip() or None
        token_file = None if token is not None else _from_environment(None, "LIGHTNING_TOKEN_FILE")
    elif token is not None and token_file is not None:
        raise ValueError("token and token_file are given, and it is one or the other")
    tls = None
    if endpoint.secure or named is not None:
        if tls_cert is None and tls_key is None:
            tls_cert, tls_key = os.environ.get("LIGHTNING_TLS_CERT"), os.environ.get("LIGHTNING_TLS_KEY")
        tls = ClientTls(
            ca=_from_environment(tls_ca, "LIGHTNING_TLS_CA"),
            cert=_path(tls_cert),
            key=_path(tls_key),
            server_name=tls_server_name,
        )
        tls.check()
    elif (token or token_file) and not endpoint.is_loopback and not allow_insecure:
        raise ValueError(
            f"the token would be sent to {endpoint} unencrypted, for everybody on the way to read; use TLS "
            f"(grpcs://{endpoint}), or say allow_insecure=True if you trust the network"
        )
    found = Credentials(tls, None if token is None else _checked(token, "the token"), _path(token_file))
    found.metadata()  # reads the token file, if there is one
    return found


class BearerChannel:
    """A channel on which every call, of whatever shape, shows a token. (gRPC's own call credentials refuse to go
    without TLS, which on this machine is no gain.)

    Args:
        channel: The channel.
        metadata: Gives the metadata of a call.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Callable[[], Metadata | None]) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`, as for the others."""
        return self._bearing(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._channel.stream_stream(*args, **kwargs))

    def _bearing(self, begin: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: begin(*args, metadata=self._metadata(), **kwargs)


def _from_environment(given: FilePath | None, variable: str) -> str | None:
    return _path(given) or os.environ.get(variable, "").strip() or None


def _path(given: FilePath | None) -> str | None:
    return None if given is None else str(given) or None


def _read_token(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the token file {path} cannot be read: {error}") from None
    return _checked(text, f"what the token file {path} holds")


def _checked(token: str, what: str) -> str:
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"{what} is no token: one line of visible ASCII characters"
        )  # which it does not show
    return token


def _bearer(token: str) -> Metadata:
    return ((AUTHORIZATION_KEY, f"Bearer {token}"),)
