"""Who may call what: every RPC with every kind of credentials, by the table that the documentation shows."""

from __future__ import annotations

import json
import logging
import pickle
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode

from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    PermissionDenied,
    Unauthenticated,
)
from lightning.rpc.security import PERMISSIONS, ROLES, Guard, Permission
from lightning.rpc.service import SERVICE, SERVICE_NAME
from lightning.rpc.tokens import TokenEntry, add_token, digest, make_token, read_tokens, revoke_token
from lightning.store import InMemoryLightningStore
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Span
from tests.rpc.certificates import EXPIRED, VALID, Authority

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
ALL_ROLES = ("viewer", "runner", "algorithm")


def documented() -> dict[str, set[str]]:
    """By the full name of an RPC: the roles that may call it, and `nobody in particular` if no token is needed."""
    table = re.search(r"<!-- rpc table -->\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert table is not None
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.group(1).splitlines()
    )
    assert columns[1:] == ["no token", *ALL_ROLES]
    found = {}
    for rpc, *marks in rows:
        assert set(marks) <= {"✓", ""}, rpc
        name = rpc.strip("`")
        found[name if "/" in name else f"{SERVICE_NAME}/{name}"] = {
            column for column, mark in zip(columns[1:], marks, strict=True) if mark
        }
    return found


TABLE = documented()
NOT_SERVED = {
    "grpc.health.v1.Health/List",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
}
"""Of these a server may have none yet."""


class Tokens:
    """A token file with one token per role, and some that are no good."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_role: dict[str, str] = {}
        for role in ALL_ROLES:
            self.by_role[role], _ = add_token(path, role, f"a-{role}", None)  # type: ignore[arg-type]
        self.expired = make_token()
        entry = TokenEntry(
            name="a-former", role="algorithm", sha256=digest(self.expired), created=0, expires=time.time() - 1
        )
        content = json.loads(path.read_text())
        content["tokens"].append(entry.model_dump(mode="json"))
        path.write_text(json.dumps(content))


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path / "tokens.json")


@pytest.fixture
async def guarded(serve: Any, store: UnreliableStore, tokens: Tokens) -> LightningStoreServer:
    """A server of `store` that asks for tokens."""
    server: LightningStoreServer = await serve(store, tokens=tokens.path)
    return server


@pytest.fixture
async def channel(guarded: LightningStoreServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(guarded.endpoint) as channel:
        yield channel


SPAN = Span(
    rollout_id="ro-nobody", attempt_id="at-1", sequence_id=0, trace_id="1" * 32, span_id="2" * 16, name="step"
)
STREAMS_OF_REQUESTS = ("StreamSpans", "WorkerSession", "ServerReflectionInfo")


async def outcome(channel: grpc.aio.Channel, method: str, token: str | None) -> StatusCode:
    """What comes of an empty request, as far as the first answer to it."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    streams = method.endswith(STREAMS_OF_REQUESTS)
    while True:
        begin: Any = (channel.stream_stream if streams else channel.unary_stream)(f"/{method}")
        call = begin(iter([b""]) if streams else b"", metadata=metadata, timeout=20)
        try:
            await call.read()
            return StatusCode.OK
        except grpc.aio.AioRpcError as error:
            if "Internal error from Core" not in (
                error.details() or ""
            ):  # the message came later than the refusal
                return error.code()
        finally:
            call.cancel()


def test_the_page_and_the_server_know_the_same_rpcs() -> None:
    assert {f"/{name}" for name in TABLE} == set(PERMISSIONS)
    assert {f"{SERVICE_NAME}/{method}" for method in SERVICE.methods_by_name} <= set(TABLE)
    assert set(ROLES) == set(ALL_ROLES)


@pytest.mark.parametrize("kind", ["no token", "a bad token", "an expired token", *ALL_ROLES])
async def test_every_rpc_is_allowed_to_whom_the_page_says(
    kind: str,
    guarded: LightningStoreServer,
    store: UnreliableStore,
    tokens: Tokens,
    channel: grpc.aio.Channel,
) -> None:
    token = {"no token": None, "a bad token": make_token(), "an expired token": tokens.expired}.get(
        kind, tokens.by_role.get(kind)
    )
    wrong = []
    refusals = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
    refusal = refusals[kind in ALL_ROLES]
    for name, allowed in TABLE.items():
        code = await outcome(channel, name, token)
        may = "no token" in allowed or kind in allowed
        # what this server does not have is unknown to everybody
        right = code not in refusals if may else code in (refusal, StatusCode.UNIMPLEMENTED)
        if not right or (code is StatusCode.UNIMPLEMENTED and name not in NOT_SERVED):
            wrong.append((name, code))
    assert not wrong
    if kind not in ALL_ROLES:
        assert not store.calls


async def test_an_expired_certificate_opens_nothing_whatever_the_token(
    serve: Any, store: UnreliableStore, tokens: Tokens, tmp_path: Path
) -> None:
    ours = Authority(tmp_path)
    options = ours.server_options(tls_client_ca=ours.file, tokens=tokens.path)
    server = await serve(store, **options)
    for validity, opens in ((EXPIRED, False), (VALID, True)):
        cert, key = ours.issue("client", "client-1", validity=validity)
        credentials = grpc.ssl_channel_credentials(
            ours.file.read_bytes(), key.read_bytes(), cert.read_bytes()
        )
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
            for name in TABLE:
                code = await outcome(channel, name, tokens.by_role["algorithm"])
                assert (code is not StatusCode.UNAVAILABLE) == opens, (name, code)
        assert bool(store.calls) == opens


async def test_a_refused_call_changes_nothing_and_says_what_to_do(
    guarded: LightningStoreServer, tokens: Tokens, connect: Any
) -> None:
    viewer = connect(guarded.endpoint, token=tokens.by_role["viewer"])
    with pytest.raises(
        PermissionDenied, match="'a-viewer' has the role 'viewer'.*EnqueueRollouts.*'algorithm'"
    ):
        await viewer.enqueue_rollout(1)
    with pytest.raises(PermissionDenied, match="DequeueRollouts.*the role 'runner'.*lightning token new"):
        await viewer.dequeue_rollout()
    with pytest.raises(PermissionDenied, match="WorkerSession"):
        await viewer.receive_commands("w", timeout=1)
    runner = connect(guarded.endpoint, token=tokens.by_role["runner"])
    with pytest.raises(ValueError, match="ro-nobody"):  # it comes as far as the store
        await runner.deliver_spans([SPAN])
    with pytest.raises(PermissionDenied, match="StreamSpans"):
        await viewer.deliver_spans([SPAN])
    with pytest.raises(Unauthenticated, match="lightning token new"):
        await connect(guarded.endpoint).deliver_spans([SPAN])
    with pytest.raises(Unauthenticated, match="LIGHTNING_TOKEN.*lightning token new"):
        await connect(guarded.endpoint).enqueue_rollout(1)
    with pytest.raises(Unauthenticated, match="does not know this token"):
        await connect(guarded.endpoint, token="ltk_wrong").query_rollouts()
    with pytest.raises(Unauthenticated, match=r"'a-former' expired at .* UTC"):
        await connect(guarded.endpoint, token=tokens.expired).wait_until_ready(5)
    assert (await viewer.statistics())["total_rollouts"] == 0


async def test_a_refused_request_is_not_read(channel: grpc.aio.Channel) -> None:
    """So that nobody without a token can fill the server's memory."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    while True:
        call = channel.stream_unary(f"/{SERVICE_NAME}/AddSpans")(endless(), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        if "Internal error from Core" not in (caught.value.details() or ""):  # as above
            break
    assert caught.value.code() is StatusCode.UNAUTHENTICATED


def test_a_call_that_is_not_in_the_table_is_allowed_to_nobody(tokens: Tokens) -> None:
    guard = Guard(str(tokens.path), make_token())
    metadata = (("authorization", f"Bearer {tokens.by_role['algorithm']}"),)
    invented = "/lightningpb.v1.LightningStoreService/Invented"
    caller = guard.identify(invented, metadata)
    assert caller is not None
    assert caller.role == "algorithm"
    for anybody in (caller, None):
        with pytest.raises(PermissionDenied, match="no rule"):
            guard.authorize(invented, anybody)
    with pytest.raises(Unauthenticated):
        guard.identify(invented, ())


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", "TOKEN"),),
        (("authorization", "Basic TOKEN"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer TOKEN"), ("authorization", "Bearer TOKEN")),
        (("authorization", b"Bearer TOKEN"),),
        (("authorization-bin", b"Bearer TOKEN"),),
    ],
)
def test_malformed_credentials_are_refused(tokens: Tokens, metadata: Any) -> None:
    guard = Guard(str(tokens.path), make_token())
    token = tokens.by_role["algorithm"]
    sent = [
        (
            key,
            value.replace(b"TOKEN", token.encode())
            if isinstance(value, bytes)
            else value.replace("TOKEN", token),
        )
        for key, value in metadata
    ]
    with pytest.raises(Unauthenticated) as caught:
        guard.identify(f"/{SERVICE_NAME}/GetRollout", sent)
    assert token not in str(caught.value)


async def test_the_file_is_read_again_when_it_changes(
    guarded: LightningStoreServer, tokens: Tokens, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = connect(guarded.endpoint, token=tokens.by_role["runner"])
    assert await runner.dequeue_rollout() is None
    revoke_token(tokens.path, "a-runner")
    with pytest.raises(Unauthenticated, match="revoked"):
        await runner.dequeue_rollout()
    fresh, _ = add_token(tokens.path, "runner", None, 60)
    assert await connect(guarded.endpoint, token=fresh).dequeue_rollout() is None
    before = tokens.path.read_text()
    tokens.path.write_text(before[:-20])
    assert await connect(guarded.endpoint, token=fresh).dequeue_rollout() is None
    assert "stays in force" in caplog.text
    tokens.path.write_text('{"tokens": []}')
    with pytest.raises(Unauthenticated):
        await connect(guarded.endpoint, token=fresh).dequeue_rollout()


async def test_a_client_follows_its_token_file(
    guarded: LightningStoreServer, tokens: Tokens, connect: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text(tokens.by_role["viewer"] + "\n")
    client = connect(guarded.endpoint, token_file=mine)
    with pytest.raises(PermissionDenied):
        await client.enqueue_rollout(1)
    mine.write_text(tokens.by_role["algorithm"])
    await client.enqueue_rollout(1)


async def test_the_environment_gives_a_client_its_token(
    guarded: LightningStoreServer,
    tokens: Tokens,
    connect: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LIGHTNING_TOKEN", tokens.by_role["viewer"])
    assert len(await connect(guarded.endpoint).query_rollouts()) == 0
    (tmp_path / "mine").write_text(tokens.by_role["algorithm"])
    monkeypatch.delenv("LIGHTNING_TOKEN")
    monkeypatch.setenv("LIGHTNING_TOKEN_FILE", str(tmp_path / "mine"))
    await connect(guarded.endpoint).enqueue_rollout(1)


async def test_no_token_is_ever_shown(
    guarded: LightningStoreServer, tokens: Tokens, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = tokens.by_role["viewer"]
    client = connect(guarded.endpoint, token=token)
    with pytest.raises(PermissionDenied) as caught:
        await client.enqueue_rollout(1)
    shown = [
        caplog.text,
        str(caught.value),
        repr(client),
        repr(vars(client)),
        repr(guarded),
        tokens.path.read_text(),
    ]
    shown += [repr(client._options), repr(read_tokens(tokens.path))]
    assert not [text for text in shown if token in text]
    with pytest.raises(ValueError, match="is no token") as malformed:
        connect(guarded.endpoint, token=f"{token} two")
    assert token not in str(malformed.value)


async def test_pickled_clients_and_servers_are_let_in(guarded: LightningStoreServer, tokens: Tokens) -> None:
    client = LightningStoreClient(guarded.endpoint, token=tokens.by_role["viewer"])
    copy: LightningStoreClient = pickle.loads(pickle.dumps(client))
    assert (await copy.statistics())["total_rollouts"] == 0
    await copy.close()
    await client.close()
    served: LightningStoreServer = pickle.loads(pickle.dumps(guarded))
    await served.enqueue_rollout(1)
    await served.close()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("", "malformed"),
        ("[]", "malformed"),
        ('{"tokens": [{"name": "a"}]}', "malformed at tokens.0.role"),
        ('{"tokens": [{"name": "a b", "role": "viewer", "sha256": "", "created": 0}]}', "tokens.0.name"),
        ('{"tokens": [{"name": "a", "role": "root", "sha256": "", "created": 0}]}', "tokens.0.role"),
    ],
)
def test_a_token_file_of_no_use_is_refused_at_the_start(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=problem):
        LightningStoreServer(InMemoryLightningStore(), port=0, tokens=path)


def test_permissions_nest() -> None:
    assert ROLES["viewer"] < ROLES["runner"] < ROLES["algorithm"] == frozenset(Permission)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LIGHTNING_TOKEN", "LIGHTNING_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)


def test_a_token_does_not_go_to_another_machine_unencrypted() -> None:
    with pytest.raises(ValueError, match=r"unencrypted.*grpcs://10\.0\.0\.1:4747.*allow_insecure=True"):
        LightningStoreClient("10.0.0.1:4747", token="ltk_x")
    LightningStoreClient("10.0.0.1:4747", token="ltk_x", allow_insecure=True)
    LightningStoreClient("grpcs://10.0.0.1:4747", token="ltk_x")
