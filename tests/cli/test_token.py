"""`lightning token`: making, listing and revoking tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning.cli import app
from lightning.cli.errors import CommandError
from lightning.rpc.tokens import digest


def run(*arguments: str) -> tuple[str, str]:
    """What the command prints, and what it says beside that."""
    ran = CliRunner().invoke(app, ["token", *arguments], catch_exceptions=False, standalone_mode=False)
    if ran.exception is not None:
        raise ran.exception
    return ran.stdout, ran.stderr


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_SERVER_TOKENS", raising=False)
    return tmp_path


def test_a_token_is_shown_once_and_its_hash_is_kept(folder: Path) -> None:
    printed, said = run("new", "--role", "runner", "--name", "night", "--expires", "30d")
    token = printed.strip()
    assert token.startswith("ltk_")
    assert len(token) > 40
    assert "'night' in tokens.json: role runner, expires 20" in said
    assert token not in said
    kept = (folder / "tokens.json").read_text()
    assert token not in kept
    assert json.loads(kept)["tokens"][0]["sha256"] == digest(token)
    assert (folder / "tokens.json").stat().st_mode & 0o777 == 0o600


def test_tokens_are_listed_and_revoked() -> None:
    first, _ = run("new", "--role", "viewer", "--name", "wall")
    second, _ = run("new", "--role", "algorithm")
    assert first != second
    listed, _ = run("list")
    assert [line.split()[1] for line in listed.splitlines()] == ["viewer", "algorithm"]
    assert "never expires" in listed
    run("revoke", "wall")
    assert "wall" not in run("list")[0]
    with pytest.raises(CommandError, match="has no token called 'wall'"):
        run("revoke", "wall")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["new", "--role", "root"], "no role 'root'; it is one of viewer, runner, algorithm"),
        (["new", "--role", "viewer", "--name", "two words"], "cannot be called 'two words'"),
        (["new", "--role", "viewer", "--expires", "soon"], "--expires takes a time like .* not 'soon'"),
        (["new", "--role", "viewer", "--expires", "0d"], "not '0d'"),
        (["list"], "tokens.json cannot be read"),
        (["revoke", "x"], "tokens.json cannot be read"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(folder: Path, arguments: list[str], problem: str) -> None:
    with pytest.raises(CommandError, match=problem):
        run(*arguments)
    assert not list(folder.glob("*token*"))


def test_a_name_is_given_once() -> None:
    run("new", "--role", "viewer", "--name", "wall")
    with pytest.raises(CommandError, match="has a token called 'wall' already"):
        run("new", "--role", "runner", "--name", "wall")
