"""Reading addresses."""

from __future__ import annotations

from typing import Any

import pytest

from lightning.rpc.address import check_listener, is_loopback, parse_endpoint


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("localhost:4747", "localhost:4747"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("http://10.0.0.7:4747", "10.0.0.7:4747"),
        ("HTTP://host:65535/", "host:65535"),
        ("grpc://store.example.org:80", "store.example.org:80"),
        (" host:4747\n", "host:4747"),
        ("[::1]:4747", "[::1]:4747"),
        ("grpc://[2001:db8::2]:4747", "[2001:db8::2]:4747"),
        ("grpcs://store.example.org:4747", "grpcs://store.example.org:4747"),
        ("https://[::1]:4747/", "grpcs://[::1]:4747"),
    ],
)
def test_what_people_write_is_understood(address: str, canonical: str) -> None:
    assert str(parse_endpoint(address)) == canonical


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "host"),
        ("localhost", "port is missing"),
        ("localhost:", "port is missing"),
        ("localhost:0", "port is missing"),
        (":4747", "host"),
        ("localhost:http", "port"),
        ("localhost:65536", "port"),
        ("localhost:-1", "port"),
        ("xmpp://localhost:4747", "scheme 'xmpp'"),
        ("ftp://localhost:4747", "scheme 'ftp'"),
        ("localhost:4747/path", "nothing but"),
        ("localhost:4747?a=b", "nothing but"),
        ("user@localhost:4747", "nothing but"),
        ("two hosts:4747", "host"),
        ("a:1,b:2", "port"),
        ("::1:4747", "port"),
    ],
)
def test_a_bad_address_is_named_with_what_is_wrong(address: str, problem: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a store") as caught:
        parse_endpoint(address)
    assert repr(address) in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("address", [None, 4747, b"localhost:4747", ("localhost", 4747)])
def test_an_address_is_a_string(address: Any) -> None:
    with pytest.raises(TypeError, match="must be a string"):
        parse_endpoint(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST", "db.localhost"])
def test_loopback_is_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_everything_else_is_the_world(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "reachable"), [("0.0.0.0", "127.0.0.1:1"), ("::", "[::1]:1"), ("10.0.0.1", "10.0.0.1:1")]
)
def test_a_wildcard_is_reached_by_loopback(host: str, reachable: str) -> None:
    assert str(check_listener(host, 1).reachable) == reachable


@pytest.mark.parametrize(
    ("port", "kind"), [(-1, ValueError), (65536, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_bad_port_is_refused(port: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="port must be"):
        check_listener("127.0.0.1", port)
