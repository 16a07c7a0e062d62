"""`lightning store`: a store server."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from lightning.rpc import LightningStoreServer


def serve_store(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")] = 4747,
    backend: Annotated[
        str,
        typer.Option(
            metavar="BACKEND",
            help="What keeps the data: [bold]sqlite:PATH[/], a file; [bold]sqlite[/], the file in your data folder; "
            "[bold]mongodb://HOSTS/DATABASE[/]; [bold]memory[/], until the server ends.",
        ),
    ] = "sqlite",
    durability: Annotated[
        str | None,
        typer.Option(
            metavar="full|normal",
            help="What a power failure may take of a file: [bold]full[/], nothing; [bold]normal[/], faster, the last "
            "moments.",
        ),
    ] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AGE|SIZE",
            help="Keep finished rollouts in a file only so long ([bold]7d[/], [bold]12h[/]) or while all takes no more "
            "room ([bold]10GB[/]); give it twice for both.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Let other machines connect without encryption: only where you trust everybody in the network.",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LIGHTNING_SERVER_TLS_CERT",
            help="The server's certificate (PEM): connections are by TLS.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="LIGHTNING_SERVER_TLS_KEY", help="Its private key (PEM)."),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LIGHTNING_SERVER_TLS_CLIENT_CA",
            help="Turn away clients without a certificate of these authorities (PEM).",
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LIGHTNING_SERVER_TOKENS",
            help="Ask for a token; those that are known, see [bold]lightning token[/].",
        ),
    ] = None,
    max_message_bytes: Annotated[
        int | None, typer.Option(metavar="BYTES", help="The largest message that is taken or sent.")
    ] = None,
    max_streams: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="How many streams may be open at once.")
    ] = None,
    max_in_flight_bytes: Annotated[
        int | None,
        typer.Option(metavar="BYTES", help="How many bytes of requests may be worked on at once."),
    ] = None,
    max_calls_per_second: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="How many calls each client may make.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Write a line for each call to stderr.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, metavar="PORT", help="Show metrics for Prometheus at this port."),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="The address to show metrics at.")] = "127.0.0.1",
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long calls under way may take in the end.")
    ] = 5.0,
) -> None:
    """Serve a store, until Ctrl-C or SIGTERM.

    Algorithms and runners meet at it. When asked to end, it refuses new calls and finishes those under way.

    Examples:

      [bold]lightning store --port 4747[/]
      [bold]lightning store --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --tokens tokens.json[/]
      [bold]lightning store --host 0.0.0.0 --insecure[/]   the same for a network where everybody is trusted
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from lightning.rpc import LightningStoreServer
    from lightning.rpc.address import is_loopback
    from lightning.store.open import full_url, open_store
    from lightning.store.persistence.abc import BackendError

    if not insecure and tls_cert is None and not is_loopback(host):
        raise CommandError(
            f"{host} can be reached from other machines, and nothing would be encrypted; give --tls-cert and "
            "--tls-key, or add --insecure if you trust everybody in the network",
            EXIT_USAGE,
        )
    limits: dict[str, Any] = {
        "max_message_bytes": max_message_bytes,
        "max_streams": max_streams,
        "max_in_flight_bytes": max_in_flight_bytes,
        "max_calls_per_second": max_calls_per_second,
    }
    if access_log:
        _show_access_log()
    with reporting(ValueError, ImportError, exit_code=EXIT_USAGE):
        server = LightningStoreServer(
            open_store(backend, durability=durability, retain=retain or None),
            host,
            port,
            allow_insecure=insecure,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            tokens=tokens,
            access_log=access_log,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            **{name: value for name, value in limits.items() if value is not None},
        )
    with reporting(OSError, ImportError, BackendError):
        asyncio.run(_serve(server, full_url(backend), host, grace))


def _refuse_options(context: typer.Context) -> None:
    """They are the server's, and would do nothing before the name of a command that is none."""
    for option in context.command.params:
        if "COMMANDLINE" in str(context.get_parameter_source(option.name or "")):
            raise CommandError(
                f"give {option.opts[0]} after {context.invoked_subcommand}, if it has it", EXIT_USAGE
            )


def _show_access_log() -> None:
    from lightning.rpc.access_log import ACCESS_LOGGER

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger(ACCESS_LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


async def _serve(server: LightningStoreServer, backend: str, host: str, grace: float) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    try:
        await server.start()
        await server.statistics()  # opens the backend, so that what is wrong with it is said now
        typer.echo(_welcome(server, backend, host))
        await asked.wait()
        typer.echo("ending: new calls are refused, those under way are finished")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # asked again, it ends at once
        await server.close(grace, "the server was told to end")


def _welcome(server: LightningStoreServer, backend: str, host: str) -> str:
    from lightning.rpc.address import is_loopback

    lines = [
        f"store ({backend}) at {server.endpoint}, Ctrl-C ends it",
        f"  runners:   lightning runner FILE.py:AGENT --connect {server.endpoint}",
        f'  trainers:  Trainer(store="{server.endpoint}", strategy={{"type": "cs", "role": "algorithm"}}, …)',
    ]
    if server.metrics_url is not None:
        lines.append(f"  metrics:   {server.metrics_url}")
    if not is_loopback(host):
        scheme = "grpcs://" if server.endpoint.startswith("grpcs://") else ""
        lines.append(f"  elsewhere: the same with {scheme}{socket.gethostname()}:{server.port}")
    return "\n".join(lines)
