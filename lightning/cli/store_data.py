"""`lightning store backup`, `export` and `import`: what a store holds, in a file."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from lightning.store.persistence.abc import Persistence

Backend = Annotated[
    str,
    typer.Option(metavar="BACKEND", help="Whose data, as in [bold]lightning store --backend[/]."),
]
STANDARD = Path("-")


def back_up_store(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    backend: Backend = "sqlite",
) -> None:
    """Copy a store's SQLite file, also while its server runs.

    The copy is as the store was at one moment, and a store itself: [bold]lightning store --backend sqlite:FILE[/].

    Examples:

      [bold]lightning store backup store-monday.db[/]
      [bold]lightning store backup --backend sqlite:/var/lib/lightning/store.db /backups/store.db[/]
    """
    from lightning.store.open import sqlite_path
    from lightning.store.persistence.abc import BackendError
    from lightning.store.persistence.sqlite_backup import back_up

    with reporting(ValueError, exit_code=EXIT_USAGE):
        path = sqlite_path(backend)
        if path is None:
            raise ValueError(f"a backup is made of a store in a SQLite file, not of {backend!r}")
    with reporting(OSError, BackendError):
        back_up(path, target)
    typer.echo(f"{path} is backed up in {target} ({target.stat().st_size / 1e6:.1f} MB)", err=True)


def export_store(
    target: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The file to write, which must not exist; - is standard output."),
    ] = STANDARD,
    backend: Backend = "sqlite",
) -> None:
    """Write everything in a store as lines of JSON.

    No server may have the store open: export a backup of it instead.

    Examples:

      [bold]lightning store export store.jsonl[/]
      [bold]lightning store export --backend sqlite:store.db | gzip > store.jsonl.gz[/]
    """
    from lightning.store.new_file import new_file
    from lightning.store.open import sqlite_path
    from lightning.store.persistence.abc import BackendError, SpansEvictedError

    with reporting(ValueError, exit_code=EXIT_USAGE):
        path = sqlite_path(backend)
    if path is not None and not path.is_file():
        raise CommandError(f"there is no store at {path}")
    with reporting(OSError, ImportError, BackendError, SpansEvictedError):
        if target == STANDARD:
            count = asyncio.run(_export(backend, sys.stdout.buffer))
        else:
            with new_file(target) as place, place.open("wb") as file:
                count = asyncio.run(_export(backend, file))
    typer.echo(f"{count} records exported", err=True)


def import_store(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What [bold]lightning store export[/] wrote; - is standard input."
        ),
    ],
    backend: Backend = "sqlite",
) -> None:
    """Put what was exported into a new store, of the same backend or of another one.

    A SQLite file appears when everything is in it. In other backends there may be a part after a failure.

    Example:

      [bold]lightning store import store.jsonl --backend sqlite:copy.db[/]
    """
    from lightning.store.new_file import new_file
    from lightning.store.open import full_url, sqlite_path
    from lightning.store.persistence.abc import BackendError

    with reporting(ValueError, exit_code=EXIT_USAGE):
        path = sqlite_path(backend)
    with reporting(OSError, ImportError, BackendError, ValueError):
        if path is None:
            count = asyncio.run(_import(source, backend))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as place:
                count = asyncio.run(_import(source, f"sqlite:{place}", durability="normal"))
    typer.echo(f"{count} records imported into {full_url(backend)}", err=True)


async def _export(backend: str, file: BinaryIO) -> int:
    from lightning.store.transfer import export_lines

    count = 0
    async with _opened(backend) as persistence:
        async for line in export_lines(persistence):
            file.write(line)
            count += 1
    file.flush()
    return count - 2  # the header and the end


async def _import(source: Path, backend: str, **options: str) -> int:
    from lightning.store.transfer import import_lines

    with sys.stdin.buffer if source == STANDARD else source.open("rb") as lines:
        async with _opened(backend, **options) as persistence:
            return await import_lines(lines, persistence)


@asynccontextmanager
async def _opened(backend: str, **options: str) -> AsyncIterator[Persistence]:
    from lightning.store.engine import StoreEngine
    from lightning.store.open import open_store

    store = open_store(backend, **options)
    assert isinstance(store, StoreEngine)
    if not store.persistence.durable:
        raise CommandError(f"the store {backend!r} ends with its server; choose one that stays", EXIT_USAGE)
    await store.persistence.open()
    try:
        yield store.persistence
    finally:
        await store.persistence.close()
