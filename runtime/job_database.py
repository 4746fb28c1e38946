"""The database of jobs: its tables, opening it, and transactions that say what went wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gentron.errors import StorageError

VERSION = 1  # of the tables, kept in `user_version`
APPLICATION = 0x47654E54  # "GeNT", kept in `application_id`
DATABASE, LOCK = "jobs.sqlite3", "lock"
TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    client TEXT NOT NULL,
    made TEXT NOT NULL,  -- JSON: what the request said
    created REAL NOT NULL,
    status TEXT NOT NULL,
    done_steps INTEGER NOT NULL DEFAULT 0,
    completed REAL,
    error_code TEXT,
    error_message TEXT,
    bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_of_client ON jobs (client, kind, number);
CREATE INDEX jobs_by_end ON jobs (completed);
CREATE TABLE attempts (  -- every time that a job was begun, and how that ended
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    outcome TEXT,  -- a job's status, or "interrupted" (killed), or "left" (for the next start)
    PRIMARY KEY (job, number)
);
CREATE TABLE keys (  -- idempotency keys; without a job: cancelled
    client TEXT NOT NULL,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT,
    job TEXT,
    created REAL NOT NULL,
    PRIMARY KEY (client, kind, key)
);
CREATE INDEX keys_by_job ON keys (job);
"""


class JobDatabase:
    """SQLite in a folder, with a write-ahead log and every commit on the disk; or in memory.

    One connection for all threads: whoever uses `cursor` or `transaction` has it alone.
    """

    def __init__(self, folder: Path | None):
        """Raises StorageError if the folder cannot be used, or another process uses it."""
        self._lock, self._folder = threading.RLock(), folder
        self._locked = None if folder is None else _lock_folder(folder)
        name = ":memory:" if folder is None else str(folder / DATABASE)
        self._connection: sqlite3.Connection | None = None
        try:
            self._connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._prepare(self._connection)
        except sqlite3.Error as error:
            self.close()
            raise self._failure(error) from error
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def cursor(self) -> Iterator[sqlite3.Connection]:
        """For reading; raises StorageError."""
        with self._lock:
            if self._connection is None:
                raise StorageError("jobs: the store is closed; the server is ending")
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise self._failure(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """On the disk when the block ends, or nothing of it; raises StorageError."""
        with self.cursor() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._locked is not None:
                os.close(self._locked)
                self._locked = None

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # no file of shared memory
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        found = _pragma(connection, "user_version"), _pragma(connection, "application_id")
        if found == (0, 0) and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.executescript(
                f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; "
                f"PRAGMA application_id = {APPLICATION}; COMMIT;"
            )
        elif found != (VERSION, APPLICATION):
            raise StorageError(
                f"{self._folder}: {DATABASE} was written by another program or version; "
                "give another folder to --jobs"
            )

    def _failure(self, error: sqlite3.Error) -> StorageError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # what is above says where
        if code == sqlite3.SQLITE_FULL:
            what = "the disk is full; free some space, or keep less (--keep-bytes, --keep-hours)"
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            what = f"{DATABASE} is damaged; move it away, or give another folder to --jobs"
        else:
            what = f"{DATABASE}: {error}; check the disk and who may write there"
        return StorageError(f"jobs in {self._folder or 'memory'}: {what}")


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _lock_folder(folder: Path) -> int:
    """Makes the folder and takes it; the lock ends with the process, however that ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}; give a folder that can be written to --jobs"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise StorageError(
                f"{folder}: cannot be locked ({error.strerror}); give a folder on a local disk "
                "to --jobs"
            ) from error
        raise StorageError(
            f"{folder}: another server (process {owner or 'unknown'}) keeps its jobs there; end "
            "it, or give this one another folder with --jobs"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle
