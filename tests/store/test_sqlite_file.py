"""What a SQLite store says of files it cannot use, and that it holds on to the one it uses, and lets it go."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning.store import SQLiteLightningStore
from lightning.store.persistence import sqlite_file, sqlite_statements
from lightning.store.persistence.abc import BackendOpenError
from lightning.store.persistence.sqlite_file import file_system_of, migrate
from lightning.testing import FakeClock

pytestmark = pytest.mark.anyio

NOBODY = 65534
OLD_FILES = Path(__file__).parent / "files"
"""What older versions wrote, by `sqlite3.Connection.iterdump`; a new schema comes with that of the last one."""
CHILD_TIMEOUT_SECONDS = 30.0


async def refusal(path: Path) -> str:
    """What a store says that must not open `path`."""
    store = SQLiteLightningStore(path)
    with pytest.raises(BackendOpenError) as caught:
        await store.statistics()
    await store.close()
    assert str(path) in str(caught.value)
    return str(caught.value)


async def make(path: Path) -> None:
    """A store with one rollout."""
    store = SQLiteLightningStore(path)
    await store.enqueue_rollout("a task")
    await store.close()


def files_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def run_child(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def world_readable_folder() -> Iterator[Path]:
    """Unlike pytest's, which only its owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be somebody who is bound by permissions, if running as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


# --- Files that cannot be used ---------------------------------------------------------------------------------


async def test_no_such_directory(tmp_path: Path) -> None:
    assert "there is no directory" in await refusal(tmp_path / "missing" / "store.db")
    assert not (tmp_path / "missing").exists()


async def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in await refusal(tmp_path)


async def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    text = b"Dear diary, " * 1000
    path.write_bytes(text)
    assert "file is not a database" in await refusal(path)
    assert path.read_bytes() == text
    assert files_in(tmp_path) == [path.name]


async def test_the_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "bookmarks.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmark (address TEXT)")
    other.close()
    before = path.read_bytes()
    assert "another program" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_newer_schema(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await make(path)
    future = sqlite3.connect(path)
    future.execute("PRAGMA user_version = 999")
    future.close()
    assert "newer version of this software (schema 999, known here: 3)" in await refusal(path)


async def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await make(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 20_000)
    assert "malformed" in await refusal(path)


async def test_a_read_only_file() -> None:
    with world_readable_folder() as folder:
        path = folder / "store.db"
        await make(path)
        path.chmod(0o444)
        with unprivileged():
            assert "read-only" in await refusal(path)
        assert files_in(folder) == ["store.db"]


async def test_a_read_only_directory() -> None:
    with world_readable_folder() as folder:
        folder.chmod(0o555)
        with unprivileged():
            assert "cannot be opened for writing" in await refusal(folder / "store.db")
        folder.chmod(0o755)


async def test_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/export {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(sqlite_file, "_MOUNTS", mounts)
    assert "network file system (nfs4)" in await refusal(tmp_path / "store.db")
    mounts.write_text(f"server:/export / nfs rw 0 0\n/dev/vda {tmp_path} ext4 rw 0 0\n")
    await make(tmp_path / "store.db")


def test_finding_the_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nh:/a /data nfs rw 0 0\ntmpfs /data tmpfs rw 0 0\nh:/b /a\\040b cifs rw 0 0\n"
    )
    kinds = {
        name: file_system_of(Path(name), mounts) for name in ("/x", "/data/x", "/database", "/a b/c/x", "/a")
    }
    assert kinds == {"/x": "ext4", "/data/x": "tmpfs", "/database": "ext4", "/a b/c/x": "cifs", "/a": "ext4"}
    assert file_system_of(Path("/x"), tmp_path / "none") is None
    assert file_system_of(tmp_path) is not None or sys.platform != "linux"


def test_an_unknown_durability(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="durability must be 'full' or 'normal', not 'some'"):
        SQLiteLightningStore(tmp_path / "store.db", durability="some")  # type: ignore[arg-type]


async def test_durability_is_what_sqlite_calls_synchronous(tmp_path: Path) -> None:
    for durability, synchronous in (("full", 2), ("normal", 1)):
        connection = sqlite_file.open_writer(tmp_path / f"{durability}.db", durability)  # type: ignore[arg-type]
        assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.close()


async def test_a_path_with_signs_that_mean_something_in_a_uri(tmp_path: Path) -> None:
    path = tmp_path / "a%20b?mode=memory#c é.db"
    await make(path)
    store = SQLiteLightningStore(path)
    assert (await store.query_rollouts()).total == 1
    await store.close()
    assert files_in(tmp_path) == [path.name]


# --- One store at a time ---------------------------------------------------------------------------------------


async def test_a_second_store_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = SQLiteLightningStore(path)
    await store.enqueue_rollout("a task")
    assert f"in use by another store (process {os.getpid()})" in await refusal(path)
    (tmp_path / "link.db").symlink_to(path)
    second = SQLiteLightningStore(tmp_path / "link.db")
    with pytest.raises(BackendOpenError, match="in use"):
        await second.statistics()
    await store.enqueue_rollout("another")  # it took no harm
    await store.close()
    assert (await second.statistics())["total_rollouts"] == 2  # it may try again
    await second.close()


HOLD = """
    import asyncio, sys
    from lightning.store import SQLiteLightningStore

    async def main():
        store = SQLiteLightningStore(sys.argv[1])
        await store.enqueue_rollout("of the child")
        print("open", flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


async def test_a_second_store_in_another_process_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with run_child(HOLD, str(path)) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "open\n"
            assert f"(process {child.pid})" in await refusal(path)
        finally:
            child.kill()
            child.wait(CHILD_TIMEOUT_SECONDS)
    store = SQLiteLightningStore(path)
    assert [rollout.input for rollout in await store.query_rollouts()] == ["of the child"]
    await store.close()


FORK = """
    import asyncio, os, sys
    from lightning.store import SQLiteLightningStore

    store = SQLiteLightningStore(sys.argv[1])

    async def in_child():
        for attempt in (lambda: store.enqueue_rollout("x"), store.query_rollouts, store.statistics):
            try:
                await attempt()
            except RuntimeError as error:
                print(error, flush=True)

    asyncio.run(store.enqueue_rollout("a task"))
    if os.fork() == 0:
        asyncio.run(in_child())
        print("ready", flush=True)
        sys.stdin.readline()  # outlives its parent
    else:
        os._exit(0)
"""


async def test_a_forked_child_gets_an_error_and_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with run_child(FORK, str(path)) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        lines = [child.stdout.readline() for _ in range(4)]
        assert lines[3] == "ready\n"
        assert all("a forked process must open its own" in line for line in lines[:3])
        child.wait(CHILD_TIMEOUT_SECONDS)
        store = SQLiteLightningStore(path)
        assert (await store.query_rollouts()).total == 1
        await store.close()
        child.stdin.write("end\n")


async def test_closing_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await make(path)
    assert files_in(tmp_path) == [path.name]
    plain = sqlite3.connect(path)
    assert plain.execute("SELECT count(*) FROM rollout").fetchone() == (1,)
    assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    plain.close()


FORGET = """
    import asyncio, sys
    from lightning.store import SQLiteLightningStore

    store = SQLiteLightningStore(sys.argv[1])
    asyncio.run(store.enqueue_rollout("a task"))
    # neither closed nor forgotten: the interpreter ends
"""


def test_the_end_of_the_interpreter_closes_it(tmp_path: Path) -> None:
    with run_child(FORGET, str(tmp_path / "store.db")) as child:
        assert child.wait(CHILD_TIMEOUT_SECONDS) == 0
    assert files_in(tmp_path) == ["store.db"]


def test_an_interrupted_process_ends(tmp_path: Path) -> None:
    with run_child(HOLD, str(tmp_path / "store.db")) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(CHILD_TIMEOUT_SECONDS) == -signal.SIGTERM


# --- Versions of the schema ------------------------------------------------------------------------------------

FIRST = (1, "CREATE TABLE item (name TEXT); INSERT INTO item VALUES ('from 1; with a semicolon');")
SECOND = (2, "ALTER TABLE item ADD COLUMN size INTEGER NOT NULL DEFAULT 7;")
THIRD = (3, "UPDATE item SET size = 8; INSERT INTO no_such_table VALUES (1);")


def plain_connection(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def test_a_file_of_an_older_version_is_brought_forward(tmp_path: Path) -> None:
    connection = plain_connection(tmp_path / "store.db")
    migrate(connection, [FIRST])
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    migrate(connection, [FIRST, SECOND])
    migrate(connection, [FIRST, SECOND])
    assert connection.execute("SELECT * FROM item").fetchall() == [("from 1; with a semicolon", 7)]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()


def test_attempts_of_a_file_of_version_1_are_counted(tmp_path: Path) -> None:
    first, second = sqlite_statements.migrations()[:2]
    connection = plain_connection(tmp_path / "store.db")
    migrate(connection, [first])
    connection.executemany(
        "INSERT INTO attempt (rollout, sequence_id, attempt_id, status, start_time, last_span_sequence_id) "
        "VALUES (1, ?, ?, ?, 0, 0)",
        [(1, "at-1", "failed"), (2, "at-2", "failed"), (3, "at-3", "running")],
    )
    migrate(connection, [first, second])
    assert dict(connection.execute("SELECT * FROM counter")) == {"attempts.failed": 2, "attempts.running": 1}
    connection.close()


@pytest.mark.parametrize("version", range(1, len(sqlite_statements.migrations())))
async def test_a_file_that_an_older_version_wrote_goes_on(tmp_path: Path, version: int) -> None:
    path = tmp_path / "store.db"
    connection = plain_connection(path)
    connection.executescript((OLD_FILES / f"version_{version}.sql").read_text(encoding="utf-8"))
    assert connection.execute("PRAGMA user_version").fetchone() == (version,)
    connection.close()
    store = SQLiteLightningStore(path, clock=FakeClock(1_000_020.0))
    statistics = await store.statistics()
    assert (statistics["total_spans"], statistics["total_attempts"], statistics["total_resources"]) == (
        6,
        3,
        2,
    )
    assert statistics["attempts_by_status"] == {"failed": 1, "succeeded": 1, "running": 1}
    rollouts = list(await store.query_rollouts())
    assert [rollout.status for rollout in rollouts] == [
        "succeeded",
        "requeuing",
        "running",
        "queuing",
        "queuing",
    ]
    assert [(rollout.input, rollout.metadata) for rollout in rollouts] == [
        ({"task": i}, {"é": i}) for i in range(5)
    ]
    assert [len(await store.query_spans(rollout.rollout_id)) for rollout in rollouts] == [1, 2, 3, 0, 0]
    claimed = await store.dequeue_many_rollouts(limit=9, worker_id="w-2")
    assert [rollout.input["task"] for rollout in claimed] == [3, 4, 1], (
        "in the order in which they were queued"
    )
    await store.update_attempt(rollouts[2].rollout_id, "latest", status="succeeded")
    await store.close()


def test_a_step_that_fails_leaves_the_version_before(tmp_path: Path) -> None:
    connection = plain_connection(tmp_path / "store.db")
    with pytest.raises(sqlite3.OperationalError, match="no_such_table"):
        migrate(connection, [FIRST, SECOND, THIRD])
    assert connection.execute("SELECT size FROM item").fetchall() == [(7,)]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert not connection.in_transaction
    connection.close()


def test_the_versions_are_numbered_without_gaps() -> None:
    assert [number for number, _ in sqlite_statements.migrations()] == [1, 2, 3]


def test_every_statement_fits_the_schema() -> None:
    connection = sqlite_file.open_writer(None, "full")
    for name, sql in sqlite_statements.QUERIES.items():
        statement = (
            sqlite_statements.with_rows(name, 2) if "VALUES …" in sql else sql.replace("(…)", "(?, ?)")
        )
        connection.execute(f"EXPLAIN {statement}", [None] * statement.count("?"))
    connection.close()


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("head_of_queue", "rollout_by_queue_position"),
        ("due_rollouts", "rollout_by_deadline"),
        ("first_deadline", "rollout_by_deadline"),
        ("rollout_by_id", "sqlite_autoindex_rollout_1"),
        ("rollout_by_attempt_id", "sqlite_autoindex_attempt_1"),
        ("known_span_ids", "span_by_attempt"),
        ("spans_of_attempt", "span_by_attempt"),
        ("ended_first", "rollout_by_end"),
        ("spans_of_dropped", "dropped_with_spans"),
    ],
)
def test_hot_statements_walk_along_an_index_and_sort_nothing(name: str, index: str) -> None:
    """At a cost that does not depend on how much is stored."""
    connection = sqlite_file.open_writer(None, "full")
    sql = sqlite_statements.QUERIES[name].replace("(…)", "(?, ?)")
    steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * sql.count("?"))]
    connection.close()
    assert any(index in step for step in steps), steps
    assert all(step.startswith("SEARCH") or index in step for step in steps), steps
