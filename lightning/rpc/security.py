"""Who may call what: one table, which every call is held against before anything of it is read.

`docs/security.md` shows the same table to people, and a test holds the two against each other.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from lightning.rpc.errors import PermissionDenied, Unauthenticated
from lightning.rpc.followed import Followed
from lightning.rpc.tokens import Role, TokenEntry, digest, read_tokens

AUTHORIZATION_KEY = "authorization"
_SCHEME = "bearer "
_OWNER_NAME = "owner"


class Permission(Enum):
    """What a call does, as far as it matters to whether it is allowed."""

    OPEN = "open"
    """Tells nothing but that a server is there; needs no token."""
    READ = "read"
    """Looks at what is stored."""
    WORK = "work"
    """Claims rollouts and reports on them."""
    CONTROL = "control"
    """Hands out work, changes and cancels it, publishes resources, commands workers."""


ROLES: Mapping[Role, frozenset[Permission]] = {
    "viewer": frozenset({Permission.OPEN, Permission.READ}),
    "runner": frozenset({Permission.OPEN, Permission.READ, Permission.WORK}),
    "algorithm": frozenset(Permission),
}
"""What each role is allowed."""

_STORE_SERVICE = {
    Permission.READ: """
        GetRollout GetLatestAttempt GetResources GetLatestResources GetWorker GetStatistics GetServerInfo
        QueryRollouts QueryAttempts QuerySpans QueryResources QueryWorkers WaitForRollouts WatchRollouts Pipeline
    """,
    Permission.WORK: """
        DequeueRollouts UpdateAttempt AddSpans StreamSpans AllocateSpanSequenceIds UpdateWorker SendHeartbeat
        WorkerSession
    """,
    Permission.CONTROL: """
        StartRollout EnqueueRollouts StartAttempt UpdateRollout AddResources UpdateResources SendWorkerCommand
    """,
}

PERMISSIONS: Mapping[str, Permission] = {
    **{
        f"/lightningpb.v1.LightningStoreService/{method}": permission
        for permission, methods in _STORE_SERVICE.items()
        for method in methods.split()
    },
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": Permission.WORK,
    "/grpc.health.v1.Health/Check": Permission.OPEN,
    "/grpc.health.v1.Health/List": Permission.OPEN,
    "/grpc.health.v1.Health/Watch": Permission.OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Permission.READ,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Permission.READ,
}
"""What each RPC takes. One that is missing here is allowed to nobody."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call."""

    name: str
    """The name of the token."""
    role: Role


class Guard:
    """Lets in those who show a token of the file.

    Args:
        path: The token file; it is read again when it changes.
        owner_token: A further token, for processes that the server's owner gives it to; allowed everything.

    Raises:
        ValueError: The file is of no use.
    """

    def __init__(self, path: str, owner_token: str) -> None:
        self._entries = Followed([path], lambda: {entry.sha256: entry for entry in read_tokens(path)})
        self._owner_digest = digest(owner_token)

    def identify(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        """Who calls; None if that does not matter.

        Args:
            method: The full name of the RPC, as `/package.Service/Method`.
            metadata: What came with the call.

        Raises:
            Unauthenticated: There is no token with it, or not a valid one.
        """
        return None if PERMISSIONS.get(method) is Permission.OPEN else self._identify(metadata)

    @staticmethod
    def authorize(method: str, caller: Caller | None) -> None:
        """Raises `PermissionDenied` if this is nothing for the caller's role."""
        permission = PERMISSIONS.get(method)
        if permission is None:
            raise PermissionDenied(f"no role may call {method}: the server has no rule for it")
        if caller is None or permission in ROLES[caller.role]:
            return
        role = _least_role(permission)
        raise PermissionDenied(
            f"the token {caller.name!r} has the role {caller.role!r}, which may not call {method.rpartition('/')[2]}: "
            f"that takes the role {role!r}; ask whoever runs the server for such a token "
            f"(lightning token new --role {role})"
        )

    def _identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        shown = [value for key, value in metadata if key == AUTHORIZATION_KEY]
        if not shown:
            raise Unauthenticated(
                "the server wants a token, and none came with the call; set LIGHTNING_TOKEN, or token=… of "
                "LightningStoreClient, to one made by `lightning token new` there"
            )
        if len(shown) > 1 or not isinstance(shown[0], str) or shown[0][: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("the call's credentials must be one header 'authorization: Bearer TOKEN'")
        shown_digest = digest(shown[0][len(_SCHEME) :].strip())
        if hmac.compare_digest(shown_digest, self._owner_digest):
            return Caller(_OWNER_NAME, "algorithm")
        return _valid(self._entries.value().get(shown_digest))


def _valid(entry: TokenEntry | None) -> Caller:
    advice = "ask whoever runs the server for a new one (lightning token new)"
    if entry is None:
        raise Unauthenticated(f"the server does not know this token; it may have been revoked: {advice}")
    if entry.expired(time.time()):
        raise Unauthenticated(
            f"the token {entry.name!r} expired at {entry.expires:%Y-%m-%d %H:%M:%S} UTC: {advice}"
        )
    return Caller(entry.name, entry.role)


def _least_role(permission: Permission) -> Role:
    return next(role for role, allowed in ROLES.items() if permission in allowed)
