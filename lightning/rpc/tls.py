"""TLS: the files that hold certificates and keys, and the credentials that gRPC makes of them.

Files are checked when a server or client is made, so that what is wrong with them is said there and then, in words. A
server reads them again whenever they change, without being restarted.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from lightning.rpc.followed import Followed


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate, and whose certificates it takes from clients.

    Args:
        cert: The file of the certificate, followed by those of intermediate authorities if there are any (PEM).
        key: The file of its private key (PEM, not encrypted).
        client_ca: The file of the authorities that clients' certificates must come from (PEM); None asks for none.
    """

    cert: str
    key: str
    client_ca: str | None = None

    def check(self) -> tuple[str, ...]:
        """The names and addresses that the certificate is for. Raises `ValueError` if a file is of no use."""
        if self.client_ca is not None:
            _check_authorities(self.client_ca, "tls_client_ca")
        return _check_pair(self.cert, self.key)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files."""
        source = _Source(self)
        # typed as if there were always something new to fetch
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", source.fetch)
        return grpc.dynamic_ssl_server_credentials(source.first, fetch, self.client_ca is not None)

    @property
    def files(self) -> list[str]:
        """All of them."""
        return [self.cert, self.key] + ([] if self.client_ca is None else [self.client_ca])


@dataclass(frozen=True)
class ClientTls:
    """Whom a client trusts, and how it shows who it is.

    Args:
        ca: The file of the authorities that the server's certificate must come from (PEM); None: those that gRPC
            brings along, which are the public ones.
        cert: The file of the client's own certificate (PEM), for servers that ask for one.
        key: The file of its private key.
        server_name: The name to find in the server's certificate, if that is not the host that is connected to.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def check(self) -> None:
        """Raises `ValueError` if a file is of no use, or one is missing."""
        check_together(tls_cert=self.cert, tls_key=self.key)
        if self.ca is not None:
            _check_authorities(self.ca, "tls_ca")
        if self.cert is not None and self.key is not None:
            _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self.cert, self.key)

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials of what the files hold now."""
        return grpc.ssl_channel_credentials(*(None if path is None else _read(path) for path in self._files))

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """The arguments that a channel needs beside them."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)

    @property
    def _files(self) -> tuple[str | None, str | None, str | None]:
        return self.ca, self.key, self.cert


def check_together(**settings: object) -> None:
    """Raises `ValueError` if some of the settings are given and others are not."""
    missing = [name for name, value in settings.items() if value is None]
    if missing and len(missing) < len(settings):
        given = next(name for name, value in settings.items() if value is not None)
        raise ValueError(f"{given} is given without {' and '.join(missing)}")


class _Source:
    """Gives gRPC the files when they have changed; it asks before each handshake, on threads of its own."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._files = Followed(tls.files, self._load)
        self.first = self._given = self._files.value()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files hold if that is new, else None."""
        now = self._files.value()
        if now is self._given:
            return None
        self._given = now
        return now

    def _load(self) -> grpc.ServerCertificateConfiguration:
        self._tls.check()
        roots = None if self._tls.client_ca is None else _read(self._tls.client_ca)
        pair = (_read(self._tls.key), _read(self._tls.cert))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _check_pair(cert: str, key: str) -> tuple[str, ...]:
    """Whom a certificate names, by having it shown in a handshake with oneself: so it is also one that is valid now,
    and the key is its own."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    upwards, downwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(downwards, upwards)
    callee = server.wrap_bio(upwards, downwards, server_side=True)
    for side in (caller, callee, caller, callee):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise ValueError(f"the certificate in {cert} is of no use: {error.verify_message}") from None
    shown: dict[str, Any] = caller.getpeercert() or {}
    return tuple(str(value) for _, value in shown.get("subjectAltName", ()))


def _load_chain(context: ssl.SSLContext, cert: str, key: str) -> None:
    for path, name in ((cert, "tls_cert"), (key, "tls_key")):
        _read(path, name)
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")  # or it would ask at the terminal
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "malformed"
        raise ValueError(
            f"tls_cert {cert} and tls_key {key} are not a certificate and its unencrypted private key in PEM form: "
            f"{reason.lower().replace('_', ' ')}"
        ) from None


def _check_authorities(path: str, name: str) -> None:
    _read(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{name} {path} holds no certificate in PEM form") from None


def _read(path: str, name: str = "the file") -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be read: {error.strerror}") from None
