"""Certificates for tests, of an authority of their own."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import trustme

VALID = {"not_before": timedelta(days=-2), "not_after": timedelta(days=1)}
EXPIRED = {"not_before": timedelta(days=-2), "not_after": timedelta(days=-1)}


class Authority:
    """Issues certificates, into files.

    Args:
        folder: Where they go.
        name: What its own file is called.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(self.file)

    def issue(self, name: str, *hosts: str, validity: dict[str, timedelta] = VALID) -> tuple[Path, Path]:
        """The files of a new certificate that names `hosts`, and of its key. Files of that name are replaced."""
        now = datetime.now(timezone.utc)
        issued = self._authority.issue_cert(
            *hosts, common_name=name, **{key: now + delta for key, delta in validity.items()}
        )
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        issued.private_key_pem.write_to_path(key)
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        return cert, key

    def server_options(self, *hosts: str, **options: Any) -> dict[str, Any]:
        """Options of a server with a certificate for `hosts`."""
        cert, key = self.issue("server", *(hosts or ("localhost", "127.0.0.1")))
        return {"tls_cert": cert, "tls_key": key, **options}
