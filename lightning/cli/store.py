"""`lightning store`: a store server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting
from lightning.cli.serving import check_workers, serve, serve_by_many, show_access_log


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
            help="Keep finished rollouts, in a file or in MongoDB, only so long ([bold]7d[/], [bold]12h[/]); in a file "
            "also while all takes no more room ([bold]10GB[/]); give it twice for both.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="NUMBER",
            help="How many processes serve at the port; more than one only with MongoDB, on Linux.",
        ),
    ] = 1,
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
    max_connection_age: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="After how long clients are asked to connect anew."),
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
    from lightning.store.open import open_store
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
        "max_connection_age": max_connection_age,
    }
    options: dict[str, Any] = {
        "allow_insecure": insecure,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "tokens": tokens,
        "access_log": access_log,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        **{name: value for name, value in limits.items() if value is not None},
    }
    store_options: dict[str, Any] = {"durability": durability, "retain": retain or None}
    with reporting(ValueError, ImportError, exit_code=EXIT_USAGE):
        check_workers(workers, backend, metrics_port)
        server = LightningStoreServer(open_store(backend, **store_options), host, port, **options)
    if workers > 1:
        serve_by_many(workers, backend, store_options, host, port, options, grace)
        return
    if access_log:
        show_access_log()
    with reporting(OSError, ImportError, BackendError):
        asyncio.run(serve(server, backend, host, grace))


def _refuse_options(context: typer.Context) -> None:
    """They are the server's, and would do nothing before the name of a command that is none."""
    for option in context.command.params:
        if "COMMANDLINE" in str(context.get_parameter_source(option.name or "")):
            raise CommandError(
                f"give {option.opts[0]} after {context.invoked_subcommand}, if it has it", EXIT_USAGE
            )
