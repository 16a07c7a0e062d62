"""`lightning demo`: the whole product in one command."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning.cli.errors import EXIT_USAGE, CommandError, reporting

if TYPE_CHECKING:
    from rich.console import Console

    from lightning.demo.algorithm import TrainingResult
    from lightning.demo.plan import TrainingPlan

_CONNECT_TIMEOUT_SECONDS = 5.0
_STRATEGIES = ("cs", "shm")


def run_demo(
    connect: Annotated[
        str | None,
        typer.Option(
            "--connect",
            "-c",
            metavar="HOST:PORT",
            help="Train through this store server (grpcs://HOST:PORT by TLS), with the runners connected to it. "
            "[dim]\\[default: start a server and runners for this training][/]",
        ),
    ] = None,
    n_runners: Annotated[int, typer.Option("--n", "-n", min=1, help="Runner processes to start.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed is another training.")] = 0,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", help="[bold]cs[/]: processes over gRPC; [bold]shm[/]: threads of this process."
        ),
    ] = "cs",
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Learning steps at most.")] = 30,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where to write the reward curve.")
    ] = Path("lightning-demo"),
) -> None:
    """Train a policy on CartPole-v1 through the control plane, and watch.

    A store server, two runner processes and an algorithm: the runners play episodes with the version of the policy
    that each is bound to and send what happened as spans while they play; the algorithm reads the spans back, does a
    policy-gradient step and publishes the next version, until the pole stays up for all 500 steps.

    Example, all in one:

      [bold]lightning demo --seed 1[/]

    The same by hand, in three terminals or on three machines:

      [bold]lightning store --port 4747[/]
      [bold]lightning runner lightning.demo:agent --connect 127.0.0.1:4747 -n 2[/]
      [bold]lightning demo --connect 127.0.0.1:4747[/]
    """
    if strategy not in _STRATEGIES:
        raise CommandError(
            f"--strategy must be one of {', '.join(_STRATEGIES)}, not {strategy!r}", EXIT_USAGE
        )
    missing = [
        name for name in ("numpy", "gymnasium", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise CommandError(
            f"the demo needs {', '.join(missing)}: pip install 'agent-lightning-grpc[demo]'", EXIT_USAGE
        )
    address = None if connect is None else _address(connect)
    _writable_folder(out)
    from rich.console import Console

    from lightning.demo.plan import TrainingPlan

    plan = TrainingPlan(max_iterations=iterations)
    console = Console()
    stored = out / f"cartpole-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}.db"
    result = _train(console, plan, seed, _execution(address, strategy, n_runners, f"sqlite:{stored}"))
    _report(console, result, out / f"cartpole-seed{seed}.png")
    backend = f"lightning store --backend sqlite:{stored}" if address is None else f"the store at {address}"
    console.print(f"what was stored    {backend}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Execution:
    """How the parts of the training are run."""

    title: str
    options: dict[str, Any]
    """For the `Trainer`."""
    hint: str | None = None


def _execution(address: str | None, strategy: str, n_runners: int, store_url: str) -> _Execution:
    if address is not None:
        options = {"strategy": {"type": "cs", "role": "algorithm"}, "store": _connected(address)}
        hint = f"no runners yet: lightning runner lightning.demo:agent --connect {address} -n 2"
        return _Execution(f"store at {address}", options, hint)
    title = f"{n_runners} runners"
    if strategy == "shm":
        return _Execution(title, {"strategy": strategy, "n_runners": n_runners, "store": store_url})
    return _Execution(title, {"strategy": {"type": strategy, "store_url": store_url}, "n_runners": n_runners})


def _train(console: Console, plan: TrainingPlan, seed: int, execution: _Execution) -> TrainingResult:
    from lightning.demo.algorithm import CartPoleTraining
    from lightning.demo.episodes import agent
    from lightning.demo.view import TrainingView
    from lightning.execution import ExecutionError
    from lightning.rpc import RemoteStoreError
    from lightning.training import Trainer

    title = f"CartPole-v1, seed {seed}, {execution.title}"
    with TrainingView(console, title, execution.hint) as view:
        training = CartPoleTraining(seed, plan, observer=view)
        trainer = Trainer(
            algorithm=training,
            agent=agent,
            runner={"heartbeat_interval": 1.0, "interval_jitter": 0.2},
            **execution.options,
        )
        with reporting(ConnectionError, RemoteStoreError, ExecutionError, RuntimeError):
            trainer.fit()
    return training.result


def _address(given: str) -> str:
    from lightning.rpc.address import parse_endpoint

    with reporting(ValueError, exit_code=EXIT_USAGE):
        return str(parse_endpoint(given))


def _connected(address: str) -> Any:
    """A client of the server at `address`, which is known to be there."""
    import asyncio

    from lightning.rpc import LightningStoreClient, PermissionDenied, Unauthenticated, UntrustedServerError

    async def greet() -> None:
        client = LightningStoreClient(address, retry_delays=())
        try:
            await client.wait_until_ready(_CONNECT_TIMEOUT_SECONDS)
        finally:
            await client.close()

    try:
        with reporting(ValueError, Unauthenticated, PermissionDenied, UntrustedServerError):
            asyncio.run(greet())
    except (ConnectionError, TimeoutError, asyncio.TimeoutError):
        raise CommandError(
            f"there is no store server at {address}; start one with: lightning store"
        ) from None
    return LightningStoreClient(address)


def _writable_folder(folder: Path) -> None:
    """Find out before the training, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror or error}") from error


def _report(console: Console, result: TrainingResult, picture: Path) -> None:
    from lightning.demo.view import save_curve, sparkline

    first, last = result.first_validation, result.last_validation
    with reporting(OSError):
        save_curve(result, picture)
    say = console.print
    say(
        f"validation return  {first:.1f} → [bold green]{last:.1f}[/] of 500, over 20 episodes each",
        highlight=False,
    )
    say(f"training returns   {sparkline(result.training_returns)}", highlight=False)
    say(f"policy versions    {len(result.training_returns) + 1}, as {result.resources_id}", highlight=False)
    if result.retried:
        say(f"retried episodes   {result.retried}, whose runner was lost", highlight=False)
    say(f"reward curve       {picture}", highlight=False, soft_wrap=True)
