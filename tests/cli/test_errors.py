"""Wrong input on the command line: one line, an exit code, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import typer

from lightning.cli.errors import CommandError, reporting, run_reporting

TIMEOUT_SECONDS = 50.0


def lightning(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from lightning.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", "TERM": "dumb"},
    )


@pytest.fixture
def taken_port() -> Generator[int, None, None]:
    """A port at which somebody listens who is no store."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ("nonsense", 2, ["No such command 'nonsense'", "(see lightning --help)"]),
        ("--nonsense", 2, ["No such option: --nonsense"]),
        ("runner", 2, ["Missing argument 'AGENT'", "(see lightning runner --help)"]),
        ("runner agents:agent -n 0", 2, ["Invalid value for '-n'", "(see lightning runner --help)"]),
        ("runner agents:agent -n many", 2, ["Invalid value for '-n'"]),
        ("runner agents:agent --concurrency 0", 2, ["Invalid value for '--concurrency'"]),
        ("runner agents:agent --wait -1", 2, ["Invalid value for '--wait'"]),
        ("runner no_such_module:agent", 2, ["agent: there is no module 'no_such_module'"]),
        ("runner json:agent", 2, ["agent 'json:agent': 'json' has no 'agent'"]),
        ("runner json:JSONDecoder", 2, ["makes a JSONDecoder, which is no Agent"]),
        ("runner json:__name__", 2, ["is not accepted"]),
        ("runner nonsense", 2, ["agent 'nonsense' is no path of the form"]),
        ("runner absent.py:agent", 2, ["agent: there is no file", "absent.py'"]),
        (
            "runner json:loads --connect localhost",
            2,
            ["'localhost' is not the address of a store: the port is missing"],
        ),
        ("runner json:loads --connect ftp://a:1", 2, ["'ftp://a:1' is not the address", "the scheme 'ftp'"]),
        ("runner json:loads --connect a:99999", 2, ["'a:99999' is not the address of a store"]),
        ("store --port 99999", 2, ["Invalid value for '--port'"]),
        ("store --backend nonsense", 2, ["unknown store 'nonsense'; a store is one of: memory, sqlite"]),
        ("store --durability some", 2, ["durability must be 'full' or 'normal', not 'some'"]),
        ("store --retain 7", 2, ["retain must be an age such as 7d", "or a size such as 10GB", "not '7'"]),
        ("store --retain 7d --backend memory", 2, ["the store 'memory' takes no retain"]),
        ("store --host 0.0.0.0", 2, ["0.0.0.0 can be reached from other machines", "--insecure"]),
        ("store --host 192.0.2.1 --insecure --port 0", 1, ["cannot listen at 192.0.2.1:0"]),
    ],
)
def test_wrong_input_gives_one_line_and_an_exit_code(
    arguments: str, exit_code: int, words: list[str], tmp_path: Path
) -> None:
    outcome = lightning(*arguments.split(), cwd=tmp_path)
    assert outcome.stdout == ""
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert outcome.returncode == exit_code


def test_a_port_that_is_taken(taken_port: int) -> None:
    outcome = lightning("store", "--port", str(taken_port))
    [line] = outcome.stderr.splitlines()
    assert line.startswith(f"error: cannot listen at 127.0.0.1:{taken_port}")
    assert outcome.returncode == 1


def test_a_server_that_is_not_there_in_time(closed_port: int, tmp_path: Path) -> None:
    (tmp_path / "my_agents.py").write_text("import lightning\n\n@lightning.rollout\ndef agent(task): ...\n")
    arguments = ["my_agents.py:agent", "--connect", f"127.0.0.1:{closed_port}", "--wait", "0.2"]
    outcome = lightning("runner", *arguments, cwd=tmp_path)
    assert outcome.stderr.splitlines() == [
        f"error: there is no store server at 127.0.0.1:{closed_port} (waited 0.2 s); start one with: lightning store"
    ]
    assert outcome.returncode == 1


def test_a_setting_in_the_environment_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_MANAGED_STORE", "perhaps")
    outcome = lightning("runner", "json:loads")
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error: LIGHTNING_MANAGED_STORE='perhaps' cannot be used")
    assert outcome.returncode == 2


def test_an_agent_module_with_a_fault_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "my_agents.py").write_text("import lightning\n\nagent = undefined\n")
    outcome = lightning("runner", "my_agents:agent", cwd=tmp_path)
    [line] = outcome.stderr.splitlines()
    assert line == (
        "error: agent: importing 'my_agents' failed: NameError: name 'undefined' is not defined "
        "(my_agents.py, line 3)"
    )
    assert outcome.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["store", "runner", "lightning runner agents.py:agent -n 2"]),
        (["--help"], ["store", "runner", "lightning runner agents.py:agent -n 2"]),
        (["store", "--help"], ["lightning store --port 4747", "--backend"]),
        (["runner", "-h"], ["lightning runner agents.py:agent", "--connect", "--concurrency"]),
        (["status", "-h"], ["lightning status --watch", "--connect", "--token-file", "--json"]),
    ],
)
def test_help_teaches_with_an_example(arguments: list[str], words: list[str]) -> None:
    outcome = lightning(*arguments)
    assert outcome.returncode == 0, outcome.stderr
    for word in words:
        assert word in outcome.stdout


def test_the_version() -> None:
    outcome = lightning("--version")
    assert outcome.stdout.startswith("lightning 0.")
    assert outcome.returncode == 0


def test_help_loads_neither_grpc_nor_pydantic() -> None:
    code = (
        "import sys; from lightning.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "finally: print([name for name in ('grpc', 'pydantic', 'opentelemetry.sdk') if name in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
    )
    assert outcome.stdout.splitlines()[-1] == "[]"


# --- reporting -----------------------------------------------------------------------------------------------------


def test_reported_are_the_expected_exceptions_only(capsys: pytest.CaptureFixture[str]) -> None:
    def command(error: BaseException) -> None:
        with reporting(ValueError, exit_code=7):
            raise error

    assert run_reporting(lambda: command(ValueError("two\n  lines"))) == 7
    assert run_reporting(lambda: command(CommandError("known"))) == 1
    assert capsys.readouterr().err == "error: two lines\nerror: known\n"
    with pytest.raises(KeyError):
        run_reporting(lambda: command(KeyError("a fault")))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (None, 0)])
def test_the_other_ends(error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        if error is not None:
            raise error

    assert run_reporting(command) == code
    assert capsys.readouterr().err == ""
