"""`lightning store backup`, `export` and `import` on real processes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning.cli import app
from lightning.cli.errors import run_reporting
from lightning.rpc import LightningStoreClient
from lightning.store import SQLiteLightningStore
from tests.cli.test_errors import lightning

DEADLINE_SECONDS = 40


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


async def make(path: Path, rollouts: int = 3) -> list[str]:
    """A store; returns the ids of its rollouts."""
    store = SQLiteLightningStore(path)
    made = [await store.enqueue_rollout({"task": number}) for number in range(rollouts)]
    await store.close()
    return [rollout.rollout_id for rollout in made]


async def ids_in(path: Path) -> list[str]:
    store = SQLiteLightningStore(path)
    found = [rollout.rollout_id for rollout in await store.query_rollouts()]
    await store.close()
    return found


@pytest.mark.anyio
async def test_export_and_import(tmp_path: Path) -> None:
    ids = await make(tmp_path / "store.db")
    done = lightning("store", "export", "a.jsonl", "--backend", "sqlite:store.db", cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", "3 records exported\n", 0)
    done = lightning("store", "import", "a.jsonl", "--backend", "sqlite:new/copy.db", cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("3 records imported into sqlite:new/copy.db\n", 0)
    done = lightning("store", "export", "--backend", "sqlite:new/copy.db", cwd=tmp_path)
    assert done.stdout == (tmp_path / "a.jsonl").read_text()
    assert await ids_in(tmp_path / "new" / "copy.db") == ids
    assert names_in(tmp_path) == ["a.jsonl", "new", "store.db"]
    assert names_in(tmp_path / "new") == ["copy.db"]


@pytest.mark.anyio
async def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    await make(tmp_path / "store.db")
    lightning("store", "export", "a.jsonl", "--backend", "sqlite:store.db", cwd=tmp_path)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[: whole.rindex(b'{"kind":"end"')])
    done = lightning("store", "import", "a.jsonl", "--backend", "sqlite:copy.db", cwd=tmp_path)
    assert done.stderr == "error: the end is missing after line 4: this is not a whole export\n"
    assert done.returncode == 1
    assert names_in(tmp_path) == ["a.jsonl", "store.db"]


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        ("export --backend sqlite:none.db", 1, "there is no store at none.db"),
        ("backup copy.db --backend sqlite:none.db", 1, "there is no store at none.db"),
        (
            "backup copy.db --backend sqlite:notes.txt",
            1,
            "notes.txt cannot be opened: file is not a database",
        ),
        ("backup notes.txt --backend sqlite:store.db", 1, "notes.txt exists already"),
        ("backup no/copy.db --backend sqlite:store.db", 1, "No such file or directory"),
        (
            "backup copy.db --backend memory",
            2,
            "a backup is made of a store in a SQLite file, not of 'memory'",
        ),
        ("backup copy.db --backend nonsense", 2, "unknown store 'nonsense'"),
        ("export notes.txt --backend sqlite:store.db", 1, "notes.txt exists already"),
        ("export --backend memory", 2, "the store 'memory' ends with its server"),
        ("import notes.txt --backend sqlite:store.db", 1, "store.db exists already"),
        ("import notes.txt --backend sqlite:copy.db", 1, "line 1: the line is not valid JSON"),
        ("import none.jsonl --backend sqlite:copy.db", 1, "No such file or directory"),
        ("import notes.txt --backend sqlite::memory:", 2, "the store 'sqlite::memory:' ends with its server"),
    ],
)
def test_what_cannot_be_done(
    words: str,
    exit_code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(make(tmp_path / "store.db"))
    (tmp_path / "notes.txt").write_text("Dear diary, " * 1000)
    code = run_reporting(lambda: app(["store", *words.split()], standalone_mode=False))
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert (shown.out, code) == ("", exit_code)
    assert names_in(tmp_path) == ["notes.txt", "store.db"]


def test_options_of_the_server_before_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["store", "--backend", "sqlite:store.db", "export"]
    assert run_reporting(lambda: app(words, standalone_mode=False)) == 2
    assert capsys.readouterr().err == "error: give --backend after export, if it has it\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-um", "lightning", "store", "--port", "0", "--backend", "sqlite:store.db"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.anyio
async def test_a_backup_while_the_server_works(server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert server.stdout is not None
    found = re.search(r" at (\S+), Ctrl-C", await asyncio.to_thread(server.stdout.readline))
    assert found is not None
    client = LightningStoreClient(found.group(1))
    told: list[str] = []

    async def work() -> None:
        while True:
            told.append((await client.enqueue_rollout("x" * 1000)).rollout_id)

    working = asyncio.ensure_future(work())
    try:
        while len(told) < 100:  # noqa: ASYNC110  # the work tells nobody
            await asyncio.sleep(0.01)
        before = len(told)
        words = ("store", "backup", "copy.db", "--backend", "sqlite:store.db")
        done = await asyncio.to_thread(lightning, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"store.db is backed up in copy.db \(\d\.\d MB\)\n", done.stderr)
        after = len(told)
        while len(told) < after + 10:  # noqa: ASYNC110  # and it goes on
            await asyncio.sleep(0.01)
        refused = await asyncio.to_thread(
            lightning, "store", "export", "--backend", "sqlite:store.db", cwd=tmp_path
        )
        assert "in use by another store" in refused.stderr
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await client.close()
    in_copy = await ids_in(tmp_path / "copy.db")
    assert in_copy == told[: len(in_copy)], "it is as the store was at one moment"
    assert len(in_copy) >= before
