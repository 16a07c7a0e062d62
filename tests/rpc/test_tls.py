"""TLS: who is trusted, what happens when certificates change, and what people are told when something is wrong."""

from __future__ import annotations

import asyncio
import logging
import pickle
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    StoreUnavailableError,
    UntrustedServerError,
)
from lightning.store import InMemoryLightningStore
from tests.rpc.certificates import EXPIRED, Authority

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    return Authority(tmp_path_factory.mktemp("ours")), Authority(tmp_path_factory.mktemp("theirs"), "other")


@pytest.fixture
def ours(authorities: tuple[Authority, Authority]) -> Authority:
    return authorities[0]


@pytest.fixture
def theirs(authorities: tuple[Authority, Authority]) -> Authority:
    return authorities[1]


async def answers(client: LightningStoreClient) -> bool:
    return (await client.statistics())["total_rollouts"] == 0


async def test_a_client_that_trusts_the_authority_connects(ours: Authority, serve: Any, connect: Any) -> None:
    server = await serve(**ours.server_options())
    assert server.endpoint == f"grpcs://127.0.0.1:{server.port}"
    assert await answers(connect(server.endpoint, tls_ca=ours.file))
    assert await answers(connect(f"localhost:{server.port}", tls_ca=ours.file))
    assert connect(f"localhost:{server.port}", tls_ca=ours.file).endpoint.startswith("grpcs://")


async def test_the_environment_says_whom_to_trust(
    ours: Authority, serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_TLS_CA", str(ours.file))
    server = await serve(**ours.server_options())
    assert await answers(connect(server.endpoint))
    plain = await serve()
    assert await answers(connect(plain.endpoint))  # the environment alone asks for no TLS


async def test_beyond_this_machine_a_certificate_suffices(ours: Authority, serve: Any, connect: Any) -> None:
    server = await serve(host="0.0.0.0", **ours.server_options())
    assert await answers(connect(server.endpoint, tls_ca=ours.file))


async def test_pickled_clients_and_servers_connect(ours: Authority, serve: Any) -> None:
    # for a name that no client here uses: the server's own processes know which certificate to expect
    server = await serve(**ours.server_options("store.example.org"))
    client = LightningStoreClient(server.endpoint, tls_ca=ours.file, tls_server_name="store.example.org")
    for original in (client, server):
        copy = pickle.loads(pickle.dumps(original))
        assert await answers(copy)
        await copy.close()
    await client.close()


async def test_an_authority_that_is_not_trusted(
    ours: Authority, theirs: Authority, serve: Any, connect: Any
) -> None:
    server = await serve(**ours.server_options())
    for client in (connect(server.endpoint, tls_ca=theirs.file), connect(server.endpoint)):
        with pytest.raises(UntrustedServerError, match=r"authority that this client does not trust.*tls_ca"):
            await client.wait_until_ready(20)
        with pytest.raises(UntrustedServerError, match=r"authority that this client does not trust.*tls_ca"):
            await client.enqueue_rollout(1)


async def test_a_certificate_for_another_name(ours: Authority, serve: Any, connect: Any) -> None:
    server = await serve(**ours.server_options("store.example.org"))
    with pytest.raises(UntrustedServerError, match="is for another name.*tls_server_name"):
        await connect(server.endpoint, tls_ca=ours.file).wait_until_ready(20)


async def test_an_expired_certificate(ours: Authority, connect: Any) -> None:
    cert, key = ours.issue("expired", "127.0.0.1", validity=EXPIRED)
    with pytest.raises(ValueError, match=r"expired\.pem is of no use: certificate has expired"):
        LightningStoreServer(InMemoryLightningStore(), port=0, tls_cert=cert, tls_key=key)
    server = grpc.aio.server()  # as one that has outlived its certificate
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    pair = (key.read_bytes(), cert.read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    with pytest.raises(UntrustedServerError, match="certificate has expired"):
        await connect(f"127.0.0.1:{port}", tls_ca=ours.file).wait_until_ready(20)
    await server.stop(None)


async def test_one_speaks_tls_and_the_other_does_not(ours: Authority, serve: Any, connect: Any) -> None:
    plain, secure = await serve(), await serve(**ours.server_options())
    with pytest.raises(UntrustedServerError, match="does not speak TLS"):
        await connect(plain.endpoint, tls_ca=ours.file).statistics()
    with pytest.raises(StoreUnavailableError, match="grpcs://"):
        await connect(f"127.0.0.1:{secure.port}").statistics()
    with pytest.raises(StoreUnavailableError, match="grpcs://"):
        await connect(f"127.0.0.1:{secure.port}").wait_until_ready(0.01)


async def test_mutual_tls(
    ours: Authority, theirs: Authority, serve: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.access")
    server = await serve(**ours.server_options(tls_client_ca=ours.file, access_log=True))
    good = dict(zip(("tls_cert", "tls_key"), ours.issue("runner", "runner-1"), strict=True))
    assert await answers(connect(server.endpoint, tls_ca=ours.file, **good))
    bad: list[dict[str, Any]] = [
        {},
        dict(zip(("tls_cert", "tls_key"), theirs.issue("runner", "runner-1"), strict=True)),
        dict(zip(("tls_cert", "tls_key"), ours.issue("late", "runner-1", validity=EXPIRED), strict=True)),
    ]
    for options in bad:
        with pytest.raises(StoreUnavailableError, match="certificate of clients.*tls_cert"):
            await connect(server.endpoint, tls_ca=ours.file, **options).enqueue_rollout(1)
    copy: LightningStoreServer = pickle.loads(pickle.dumps(server))  # shows the server's certificate
    assert await answers(copy)  # type: ignore[arg-type]
    await copy.close()
    assert "GetStatistics peer=ipv4:127.0.0.1:" in caplog.text
    assert " token=- certificate=runner code=OK " in caplog.text


async def test_new_certificates_are_taken_up(
    tmp_path: Path, serve: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = Authority(tmp_path), Authority(tmp_path, "second")
    server = await serve(**first.server_options())
    old = connect(server.endpoint, tls_ca=first.file)
    assert await answers(old)
    (tmp_path / "server.key").write_text("half of a key")
    assert await answers(connect(server.endpoint, tls_ca=first.file))
    assert "stays in force" in caplog.text
    second.issue("server", "127.0.0.1")
    assert await answers(connect(server.endpoint, tls_ca=second.file))
    with pytest.raises(UntrustedServerError):
        await connect(server.endpoint, tls_ca=first.file).statistics()
    assert await answers(old)  # whose connection was made before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tls_cert": "server.pem"}, "tls_cert is given without tls_key"),
        ({"tls_key": "server.key"}, "tls_key is given without tls_cert"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca is given without"),
        (
            {"tls_cert": "server.pem", "tls_key": "ca.pem"},
            "not a certificate and its unencrypted private key",
        ),
        ({"tls_cert": "server.key", "tls_key": "server.key"}, "not a certificate and its unencrypted"),
        ({"tls_cert": "nowhere", "tls_key": "server.key"}, "tls_cert .*nowhere cannot be read: No such file"),
        (
            {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "server.key"},
            "tls_client_ca .* holds no certificate",
        ),
    ],
)
def test_files_of_no_use_are_named_by_the_server(
    ours: Authority, tmp_path: Path, options: dict[str, str], problem: str
) -> None:
    ours.server_options()
    files = {name: ours.file.parent / file for name, file in options.items()}
    with pytest.raises(ValueError, match=problem):
        LightningStoreServer(InMemoryLightningStore(), port=0, **files)


@pytest.mark.parametrize(
    ("address", "options", "problem"),
    [
        ("grpcs://host:1", {"tls_cert": "server.pem"}, "tls_cert is given without tls_key"),
        ("grpcs://host:1", {"tls_ca": "server.key"}, "tls_ca .* holds no certificate"),
        ("grpcs://host:1", {"tls_ca": "nowhere"}, "tls_ca .* cannot be read"),
        ("grpc://host:1", {"tls_ca": "ca.pem"}, "tls_ca is given, but the address asks for .* without TLS"),
        ("grpcs://host:1", {"tls_cert": "server.pem", "tls_key": "ca.pem"}, "tls_key .*ca.pem"),
    ],
)
def test_files_of_no_use_are_named_by_the_client(
    ours: Authority, address: str, options: dict[str, str], problem: str
) -> None:
    ours.server_options()
    files = {name: ours.file.parent / file for name, file in options.items()}
    with pytest.raises(ValueError, match=problem):
        LightningStoreClient(address, **files)  # type: ignore[arg-type]


async def test_a_forked_process_is_let_in_by_its_relay(ours: Authority, serve: Any, tmp_path: Path) -> None:
    """The process that speaks gRPC for one that cannot gets the credentials too."""
    from lightning.rpc.relay import RelayedConnection

    server = await serve(**ours.server_options())
    client = LightningStoreClient(server.endpoint, tls_ca=ours.file)
    client._connection = await asyncio.to_thread(RelayedConnection, client._endpoint, client._options)
    assert await answers(client)
    await client.close()
