"""The worked example of `docs/security.md`, command by command as shown."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.rpc.certificates import Authority

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
DEADLINE_SECONDS = 50


def block(language: str, words: str) -> str:
    """The one block of the page that begins as `words` do."""
    (found,) = (
        code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if code.startswith(words)
    )
    return found


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number: int = listener.getsockname()[1]
    return number


class Shell:
    """Runs what the page shows, in a folder, with this environment's `lightning` and `python`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._env = {**os.environ, "PATH": path, "COLUMNS": "200", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}

    def adapted(self, shown: str) -> str:
        """With a port that is free here."""
        return shown.replace("4747", str(self.port))

    def run(self, script: str) -> str:
        ran = subprocess.run(
            ["bash", "-euc", self.adapted(script)],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    @contextmanager
    def running(self, command: str, sign: str) -> Iterator[None]:
        """While a command runs that has said `sign`; afterwards it is interrupted, and must end well."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {self.adapted(command)}"],
            cwd=self.folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as output:
            try:
                said = []
                for line in output:
                    said.append(line)
                    if sign in line:
                        break
                else:
                    pytest.fail(f"{command} ended: {''.join(said)}")
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(DEADLINE_SECONDS)


@pytest.fixture
def shell(tmp_path: Path, port: int) -> Shell:
    return Shell(tmp_path, port)


def make_certificates(shell: Shell) -> None:
    if shutil.which("openssl"):
        shell.run(block("sh", "openssl req"))
    else:  # the same by other means, for the sake of the rest of the page
        Authority(shell.folder).issue("server", "localhost", "127.0.0.1")


def test_the_worked_example_works(shell: Shell) -> None:
    make_certificates(shell)
    shell.run(block("sh", "lightning token new"))
    tokens = (shell.folder / "tokens.json").stat()
    assert tokens.st_mode & 0o777 == 0o600
    (shell.folder / "agent.py").write_text(block("python", "import lightning as lt"))
    (shell.folder / "look.py").write_text(shell.adapted(block("python", "import asyncio\nfrom lightning")))
    with ExitStack() as stack:
        stack.enter_context(shell.running(block("sh", "lightning store"), "Ctrl-C ends it"))
        stack.enter_context(shell.running(block("sh", "lightning runner"), "Ctrl-C ends them"))
        assert shell.run("python look.py") == "succeeded\n"
        # and without a token, or with one of another role, nothing: one line says why
        runner = block("sh", "lightning runner").strip()
        shell.run("lightning token new --role viewer > viewer.token")
        for options, problem in (
            ("", "the server wants a token"),
            ("--token-file viewer.token", "has the role 'viewer'"),
        ):
            refused = shell.run(runner.replace("--token-file runner.token", options) + " 2>&1 || true")
            assert refused.startswith("error: ")
            assert problem in refused
            assert refused.count("\n") == 1
