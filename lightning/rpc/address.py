"""Addresses of stores: reading what people write, and telling loopback from the rest of the world."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import sys
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

DEFAULT_PORT = 4747

_SCHEMES = {"http": False, "grpc": False, "https": True, "grpcs": True}
"""What may stand before an address, and whether the connection is then encrypted."""
_MAX_PORT = 65535
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Addresses to listen at that mean "everywhere", and where to reach such a server from its own machine."""


@dataclass(frozen=True)
class Endpoint:
    """Where a store is served."""

    host: str
    port: int
    secure: bool | None = None
    """Whether by TLS; None: the address does not say."""

    def __str__(self) -> str:
        return f"grpcs://{self.target}" if self.secure else self.target

    @property
    def target(self) -> str:
        """As gRPC writes it, without the scheme."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be at the other end."""
        return is_loopback(self.host)

    @property
    def reachable(self) -> Endpoint:
        """This endpoint as clients on the same machine write it: not a wildcard."""
        return replace(self, host=_WILDCARDS.get(self.host, self.host))


def parse_endpoint(address: str) -> Endpoint:
    """Read `host:port`; IPv6 hosts stand in brackets. `grpcs://` or `https://` before it asks for TLS, `grpc://` or
    `http://` for none.

    Raises:
        TypeError: `address` is not a string.
        ValueError: It cannot be read. The message names it and says what is wrong.
    """
    if not isinstance(address, str):
        raise TypeError(f"a store's address must be a string like 'localhost:4747', not {address!r}")
    scheme, separator, rest = address.strip().rpartition("://")
    if separator and scheme.lower() not in _SCHEMES:
        raise _bad(address, f"the scheme {scheme!r} is not known, use grpc:// or grpcs:// (with TLS) or none")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _bad(address, str(error).lower()) from None
    if parts.path.rstrip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise _bad(address, "there must be nothing but a host and a port")
    if not host or re.search(r"[\s,;\\]", host):
        raise _bad(address, "the host is missing or malformed")
    if not port:
        raise _bad(address, f"the port is missing, as in '{host}:{DEFAULT_PORT}'")
    return Endpoint(host, port, _SCHEMES[scheme.lower()] if separator else None)


def check_listener(host: str, port: int) -> Endpoint:
    """The endpoint to listen at; port 0 lets the system pick one. Raises `ValueError` or `TypeError` for a bad one."""
    if not isinstance(host, str):
        raise TypeError(f"host must be a string, not {host!r}")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be a whole number, not {port!r}")
    if not 0 <= port <= _MAX_PORT:
        raise ValueError(f"port must be between 0 and {_MAX_PORT}, not {port}")
    return Endpoint(host.strip("[]"), port)


def is_loopback(host: str) -> bool:
    """Whether `host` stands for this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def check_port_is_free(endpoint: Endpoint) -> None:
    """Find out why a server could not listen at `endpoint`, in words.

    Raises:
        OSError: The port is taken, or there is no such address on this machine.
    """
    for probe in _bind_all(endpoint):
        probe.close()


class PortReservation:
    """Holds a port for servers of this user's that share it, and keeps others out. It listens to nobody itself.

    Args:
        endpoint: Where; of port 0 it picks one.

    Raises:
        OSError: The port is taken, or there is no such address on this machine, or this system cannot share ports.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        if sys.platform != "linux":  # elsewhere, connections would not be spread
            raise OSError(errno.ENOTSUP, "several processes can share a port on Linux only")
        self._sockets = _bind_all(endpoint)
        self.port: int = self._sockets[0].getsockname()[1]
        """The port."""
        for held in self._sockets:
            # From here on, the like can bind, and only they: bound alone first, it was nobody else's.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def close(self) -> None:
        """Hold it no more."""
        for held in self._sockets:
            held.close()


def _bind_all(endpoint: Endpoint) -> list[socket.socket]:
    """A socket at each address that the endpoint's host stands for, all of the same port."""
    try:
        candidates = socket.getaddrinfo(
            endpoint.host or None, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise OSError(error.errno, f"cannot listen at {endpoint}: {error.strerror}") from None
    bound: list[socket.socket] = []
    port = endpoint.port
    try:
        for family, kind, protocol, _, address in candidates:
            bound.append(socket.socket(family, kind, protocol))
            bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound[-1].bind((address[0], port, *address[2:]))
            port = bound[-1].getsockname()[1]
    except OSError as error:
        for one in bound:
            one.close()
        raise listen_error(endpoint, error.errno, error.strerror) from None
    return bound


def listen_error(endpoint: Endpoint, number: int | None, problem: str | None) -> OSError:
    """The error of a server that cannot listen at `endpoint`."""
    advice = "stop the program that listens there, or choose another port (0 picks a free one)"
    return OSError(number, f"cannot listen at {endpoint}: port {endpoint.port}: {problem}; {advice}")


def _bad(address: str, problem: str) -> ValueError:
    return ValueError(f"{address!r} is not the address of a store: {problem}")
