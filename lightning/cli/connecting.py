"""How commands reach a store server: one set of options for all of them, and one way to say that it did not work.

A command that is decorated with `to_a_server` has the options `--connect`, `--tls-ca`, …, `--token-file`, and gets what
was given there as its first argument, a `Server`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from lightning.cli.errors import EXIT_USAGE, reporting

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreClient

T = TypeVar("T")

_PANEL = "Connection"
_RETRY_DELAYS_SECONDS = (0.5, 1.0)
"""A person who waits for an answer wants to know soon that nobody gives one."""


@dataclass(frozen=True)
class Server:
    """Which server, and how to be let in."""

    address: str
    options: Mapping[str, Any]
    """Of the `LightningStoreClient`."""

    def client(self, **more: Any) -> LightningStoreClient:
        """A client of it, which the caller closes. Raises `CommandError` if the options are of no use."""
        from lightning.rpc import LightningStoreClient

        with reporting(ValueError, exit_code=EXIT_USAGE):
            return LightningStoreClient(self.address, **self.options, **more)

    def ask(self, question: Callable[[LightningStoreClient], Awaitable[T]]) -> T:
        """Connect, ask, and return the answer.

        Raises:
            CommandError: The server is not there, does not let us in, or refuses.
        """
        from lightning.rpc import RemoteStoreError

        client = self.client(retry_delays=_RETRY_DELAYS_SECONDS, request_timeout=10.0)

        async def main() -> T:
            try:
                return await question(client)
            finally:
                await client.close()

        with reporting(ValueError, RemoteStoreError):
            return asyncio.run(main())


def _options(
    connect: Annotated[
        str,
        typer.Option(
            "--connect",
            "-c",
            metavar="HOST:PORT",
            rich_help_panel=_PANEL,
            help="The store server; grpcs://HOST:PORT by TLS.",
        ),
    ] = "127.0.0.1:4747",
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="The authorities that the server's certificate must come from (PEM). "
            "[dim]\\[default: the public ones][/]",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Our own certificate (PEM), for a server that asks for one.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_PANEL, help="Its private key (PEM)."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Holds the token to show the server; or set [bold]LIGHTNING_TOKEN[/].",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            rich_help_panel=_PANEL,
            help="Send the token to another machine although unencrypted.",
        ),
    ] = False,
) -> Server:
    """The options, and what becomes of them."""
    return Server(
        connect,
        {
            "tls_ca": tls_ca,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "token_file": token_file,
            "allow_insecure": insecure,
        },
    )


def to_a_server(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the options that say which server, in place of its first parameter, a `Server`."""
    own = list(_parameters(command).values())[1:]
    theirs = _parameters(_options)

    @functools.wraps(command)
    def connecting(**arguments: Any) -> T:
        server = _options(**{name: arguments.pop(name) for name in theirs})
        return command(server, **arguments)

    parameters = [*own, *theirs.values()]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    connecting.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # what typer reads
    connecting.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return connecting


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return {
        name: parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
    }
