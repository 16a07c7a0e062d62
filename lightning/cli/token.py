"""`lightning token`: the tokens that a store server knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from lightning.rpc.tokens import TokenEntry

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

File = Annotated[
    Path,
    typer.Option(
        "--file",
        metavar="FILE",
        envvar="LIGHTNING_SERVER_TOKENS",
        help="The token file, as given to [bold]lightning store --tokens[/].",
    ),
]


@app.callback()
def token() -> None:
    """Make, list and revoke the tokens that a store server asks for. A running server notices at once."""


@app.command("new")
def new_token(
    role: Annotated[
        str,
        typer.Option(
            help="[bold]viewer[/]: reads. [bold]runner[/]: also claims rollouts and reports on them. "
            "[bold]algorithm[/]: everything."
        ),
    ],
    file: File = Path("tokens.json"),
    name: Annotated[
        str | None,
        typer.Option(
            help="What lists and logs call it. [dim]\\[default: one made up][/]", show_default=False
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="When it ends, from now: 90s, 30m, 12h, 30d or 8w. [dim]\\[default: never][/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a token and print it. It is shown this once: the file keeps only its hash.

    Examples:

      [bold]lightning token new --role runner --expires 30d > runner.token[/]
      [bold]LIGHTNING_TOKEN=$(lightning token new --role viewer) python look.py[/]
    """
    from typing import get_args

    from lightning.rpc.tokens import Role, add_token

    if role not in get_args(Role):
        raise CommandError(f"there is no role {role!r}; it is one of {', '.join(get_args(Role))}", EXIT_USAGE)
    with reporting(ValueError, OSError, exit_code=EXIT_USAGE):
        made, entry = add_token(file, role, name, None if expires is None else _seconds(expires))  # type: ignore[arg-type]
    typer.echo(f"token {entry.name!r} in {file}: role {entry.role}, {_ending(entry)}", err=True)
    typer.echo(made)


@app.command("list")
def list_tokens(file: File = Path("tokens.json")) -> None:
    """List the tokens: name, role, when made, when they end."""
    from lightning.rpc.tokens import read_tokens

    with reporting(ValueError):
        entries = read_tokens(file)
    for entry in entries:
        typer.echo(f"{entry.name:24} {entry.role:9} made {entry.created:%Y-%m-%d}  {_ending(entry)}")


@app.command("revoke")
def revoke_token(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="As listed.")],
    file: File = Path("tokens.json"),
) -> None:
    """Revoke a token: from now on it is refused."""
    from lightning.rpc import tokens

    with reporting(ValueError, OSError):
        tokens.revoke_token(file, name)
    typer.echo(f"token {name!r} is revoked")


def _ending(entry: TokenEntry) -> str:
    import time

    if entry.expires is None:
        return "never expires"
    word = "expired" if entry.expired(time.time()) else "expires"
    return f"{word} {entry.expires:%Y-%m-%d %H:%M} UTC"


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip())
    if found is None or int(found.group(1)) == 0:
        raise ValueError(f"--expires takes a time like 90s, 30m, 12h, 30d or 8w, not {text!r}")
    return int(found.group(1)) * float(_UNIT_SECONDS[found.group(2)])
