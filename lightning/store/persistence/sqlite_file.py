"""The file: opening it, or saying clearly why not; holding it for one process; and what its errors mean."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lightning.store.persistence.abc import BackendError, BackendFullError, BackendOpenError
from lightning.store.persistence.sqlite_statements import migrations

logger = logging.getLogger(__name__)

Durability = Literal["full", "normal"]

APPLICATION_ID = 0x4C474E47
"""Marks a file as ours, in its header (`LGNG`)."""

_SYNCHRONOUS: dict[Durability, str] = {"full": "FULL", "normal": "NORMAL"}
_PAGE_BYTES = 8192
"""Of new files: seven spans of a kilobyte fit, where a page half as large has room for three and wastes a quarter."""
_WRITER_CACHE_KIBIBYTES = 65_536
_CHECKPOINT_PAGES = 2048
"""How far the write-ahead log grows before it is worked into the file: 16 MiB, which a start reads in an instant."""
_KEPT_LOG_BYTES = 32 * 1024 * 1024
_LONG_LOG_BYTES = 64 * 1024 * 1024
_LOG_WAIT_SECONDS = 0.5
_LEAST_ROOM_BYTES = 1024 * 1024
_BUSY_TIMEOUT_SECONDS = 5.0
"""How long to wait for other programs that look into the file, such as a backup."""
_CACHED_STATEMENTS = 1024

_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs4?|cifs|smb\w+|afs|coda|davfs|beegfs|ceph|gfs2|glusterfs|gpfs|lustre|ocfs2"
    r"|fuse\.(cephfs|davfs2|gcsfuse|glusterfs|juicefs|rclone|s3fs|sshfs)"
)
_MOUNTS = Path("/proc/self/mounts")
_OCTAL = re.compile(r"\\([0-7]{3})")
"""How the list of mounts writes a space."""


# --- One process at a time --------------------------------------------------------------------------------------


class FileLock:
    """Holds a file beside the database as long as this process has the database open.

    It is a lock of its own, on a file of its own: those that SQLite takes on the database come and go with every
    transaction, and opening and closing the database's file a second time would drop them. The kernel releases it
    when the process ends, however it ends; and it keeps out a second opener in the same process, too.

    Raises:
        BackendOpenError: It is held already, or the directory cannot be written.
    """

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + "-lock")
        self._descriptor = -1
        while self._descriptor < 0:
            descriptor = self._acquire(database)
            if _is_at(descriptor, self._path):
                self._descriptor = descriptor
            else:  # its last holder removed it between our opening and our locking it
                os.close(descriptor)
        with suppress(OSError):  # on a full disk; it is only there to be read by people
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        _held_locks.add(self)

    def release(self) -> None:
        """Let others have it. Harmless when called twice."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close it without a word to others: in a forked child, to which the lock does not belong."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _acquire(self, database: Path) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BackendOpenError(
                f"{database} cannot be opened for writing: creating {self._path.name} beside it failed ({error})"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace")
            os.close(descriptor)
            raise BackendOpenError(
                f"{database} is in use by another store (process {holder or 'unknown'}); one file serves one store at "
                "a time: connect to its server instead, or choose another file"
            ) from None
        return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


_held_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held_locks):
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)


# --- Opening ----------------------------------------------------------------------------------------------------


def check_place(path: Path) -> None:
    """Raises `BackendOpenError` if there cannot be a database at `path`."""
    if path.is_dir():
        raise BackendOpenError(f"{path} is a directory, not a database file")
    if not path.parent.is_dir():
        raise BackendOpenError(f"{path} cannot be created: there is no directory {path.parent}")
    effective = os.access in os.supports_effective_ids
    if path.exists() and not os.access(path, os.R_OK | os.W_OK, effective_ids=effective):
        raise BackendOpenError(f"{path} is read-only for this process; the store must be able to write it")
    kind = file_system_of(path)
    if kind is not None and _NETWORK_FILE_SYSTEMS.fullmatch(kind):
        raise BackendOpenError(
            f"{path} is on a network file system ({kind}), where SQLite cannot keep data safe; choose a local disk, "
            "and let other machines reach the store through its server"
        )


def check_room(path: Path) -> None:
    """Raises `BackendFullError` if the disk is so full that one write may find room and the next one not."""
    if shutil.disk_usage(path.parent).free < _LEAST_ROOM_BYTES:
        raise _no_room()


def file_system_of(path: Path, mounts: Path | None = None) -> str | None:
    """The kind of file system that `path` is on; None where the system does not say."""
    try:
        lines = (mounts or _MOUNTS).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found: tuple[int, str | None] = (-1, None)
    for line in lines:
        _, mount_point, kind, *_ = line.split(" ")
        place = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), mount_point))
        if path.is_relative_to(place) and len(place.parts) >= found[0]:
            found = (len(place.parts), kind)  # a later mount hides an earlier one
    return found[1]


def open_writer(path: Path | None, durability: Durability) -> sqlite3.Connection:
    """The connection that writes, to a database that is ready for use. None: in memory.

    Raises:
        BackendOpenError: It is no database, another program's, a newer version's, or cannot be written.
    """
    connection = _connect(":memory:" if path is None else f"{path.as_uri()}?mode=rwc")
    try:
        _prepare(connection, durability)
        check_schema(connection, migrations())
        if path is not None and connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise BackendOpenError("SQLite cannot keep a write-ahead log there")
        migrate(connection, migrations())
    except (sqlite3.Error, BackendOpenError) as error:
        connection.close()
        why = "there is no room left on its disk" if _is_for_want_of_room(error) else error
        raise BackendOpenError(f"{path or 'a database in memory'} cannot be opened: {why}") from error
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that sees what was committed when a read begins."""
    connection = _connect(f"{path.as_uri()}?mode=ro")
    _prepare_session(connection)
    return connection


def _connect(database: str) -> sqlite3.Connection:
    return sqlite3.connect(
        database,
        timeout=_BUSY_TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,  # each is used by one thread at a time, see `ReadPool`
        cached_statements=_CACHED_STATEMENTS,
        uri=True,
    )


def _prepare(connection: sqlite3.Connection, durability: Durability) -> None:
    for setting in (
        f"page_size = {_PAGE_BYTES}",  # counts only when the file is created
        f"synchronous = {_SYNCHRONOUS[durability]}",
        "fullfsync = ON",  # counts only on macOS, whose fsync leaves data in the drive's cache
        f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        f"journal_size_limit = {_KEPT_LOG_BYTES}",
        f"cache_size = -{_WRITER_CACHE_KIBIBYTES}",
        "secure_delete = OFF",
    ):
        connection.execute(f"PRAGMA {setting}")
    _prepare_session(connection)


def _prepare_session(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("CREATE TEMP TABLE wanted (rollout_id TEXT PRIMARY KEY) WITHOUT ROWID")


def check_schema(connection: sqlite3.Connection, versions: Sequence[tuple[int, str]]) -> int:
    """The version of the schema that the file has; 0 if it is empty.

    Raises:
        BackendOpenError: The file belongs to another program, or to a newer version of this one.
    """
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise BackendOpenError("it is the database of another program")
    newest = versions[-1][0]
    if version > newest:
        raise BackendOpenError(
            f"it was written by a newer version of this software (schema {version}, known here: {newest}); "
            "upgrade to open it"
        )
    return int(version)


def migrate(connection: sqlite3.Connection, versions: Sequence[tuple[int, str]]) -> None:
    """Bring the schema to the newest of `versions` (number and SQL, oldest first), each step whole or not at all.

    Raises:
        BackendOpenError: As `check_schema`.
    """
    current = check_schema(connection, versions)
    for number, sql in versions:
        if number <= current:
            continue
        marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};"
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\n{marks}\nCOMMIT;")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


# --- Using ------------------------------------------------------------------------------------------------------


class LogKeeper:
    """Keeps the write-ahead log from growing without end.

    SQLite starts it anew when all of it has been worked into the file and nobody reads from it. Where reads overlap
    all the time that moment never comes by itself; so when the log is long, writing pauses until the reads that are
    under way have ended. Should they take very long, writing goes on, and it is tried again when the log has grown.
    """

    def __init__(self, database: Path) -> None:
        self._log = database.with_name(database.name + "-wal")
        self._long_bytes = _LONG_LOG_BYTES

    def tidy(self, connection: sqlite3.Connection) -> None:
        """Call it between two transactions."""
        try:
            size_bytes = self._log.stat().st_size
            if size_bytes >= self._long_bytes:
                self._long_bytes = size_bytes + _LONG_LOG_BYTES
                if _restart_log(connection):
                    self._long_bytes = _LONG_LOG_BYTES
        except (OSError, sqlite3.Error):
            # What was acknowledged is in the log and stays there; a disk that is full may have room later.
            logger.warning(
                "could not work the write-ahead log %s into its database", self._log, exc_info=True
            )


def _restart_log(connection: sqlite3.Connection) -> bool:
    _set_busy_timeout(connection, _LOG_WAIT_SECONDS)
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        return not busy
    finally:
        _set_busy_timeout(connection, _BUSY_TIMEOUT_SECONDS)


def _set_busy_timeout(connection: sqlite3.Connection, seconds: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Have several reads see the same state."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def as_backend_error(error: Exception) -> Exception:
    """What callers are told of an error that SQLite raised; other errors are theirs and stay as they are."""
    if isinstance(error, (sqlite3.DataError, OverflowError)):
        return ValueError(f"a value is too large to be stored: {error}")
    if not isinstance(error, sqlite3.Error):
        return error
    if _is_for_want_of_room(error):
        return _no_room()
    return BackendError(f"the database failed: {error}")


def _no_room() -> BackendFullError:
    return BackendFullError("there is no room left on the disk of the database; nothing was written")


def _is_for_want_of_room(error: Exception) -> bool:
    # the second is for the index of the log, which is in shared memory (Python 3.10 does not tell)
    return "disk is full" in str(error) or getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE"
