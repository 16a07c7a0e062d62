"""Makes importable what stands beside these tests, and the example of a store of one's own, their foreign store.
And what it takes to be let in by a server that asks for everything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning.rpc.tokens import add_token
from tests.rpc.certificates import Authority

for folder in (Path(__file__).parent, Path(__file__).parents[2] / "examples" / "own_store"):
    sys.path.append(str(folder))


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mutual TLS and a token: options of the server, and of the client."""
    folder = tmp_path_factory.mktemp("credentials")
    authority = Authority(folder)
    token, _ = add_token(folder / "tokens.json", "algorithm", None, 3600)
    cert, key = authority.issue("client", "client-1")
    return (
        authority.server_options(tls_client_ca=authority.file, tokens=folder / "tokens.json"),
        {"tls_ca": authority.file, "tls_cert": cert, "tls_key": key, "token": token},
    )
