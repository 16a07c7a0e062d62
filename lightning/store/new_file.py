"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place to write what appears at `path` once it is complete and on the disk; nothing does if writing it fails.

    Raises:
        FileExistsError: There is something at `path` already.
    """
    _refuse_existing(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        place = Path(folder) / path.name
        yield place
        _sync(place)
        _refuse_existing(path)
        place.rename(path)
    _sync(path.parent)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name, or remove it first")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
