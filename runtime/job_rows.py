"""Jobs as rows: what is said to the database, inside a transaction of `job_database.py`."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace
from typing import Any

from gentron.errors import KeyReusedError
from gentron.runtime.jobs import CANCELLED, FAILED, QUEUED, RUNNING, Job, Key, Retention

Rows = sqlite3.Connection
MADE = ("settings", "output", "model", "digest", "priority", "deadline")
INTERRUPTED, LEFT = "interrupted", "left"  # of an attempt: killed, or for the next start
CANCELLED_KEYS = (24 * 3600.0, 10_000)  # seconds for which they are remembered, and how many
NEVER_STARTED = ("cancelled", "the job was cancelled before it was started")


def insert(db: Rows, job: Job) -> None:
    made = json.dumps({name: getattr(job, name) for name in MADE}, ensure_ascii=False)
    code, message = job.error or (None, None)
    db.execute(
        "INSERT INTO jobs (id, kind, client, made, created, status, completed, error_code,"
        " error_message) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (job.id, job.kind, job.client, made, job.created, job.status, job.completed, code, message),
    )


def read(db: Rows, id: str) -> Job | None:
    row = db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
    return None if row is None else as_job(row)


def as_job(row: sqlite3.Row) -> Job:
    error = None if row["error_code"] is None else (row["error_code"], row["error_message"])
    columns = ("id", "kind", "client", "created", "status", "done_steps", "completed")
    values: dict[str, Any] = {name: row[name] for name in columns}
    return Job(**values, **json.loads(row["made"]), error=error)


def page(
    db: Rows, client: str, kind: str, limit: int, after: str | None, newest: bool
) -> list[Job]:
    """At most `limit` jobs of a client, those behind `after`; none if that is not theirs."""
    order, behind = ("DESC", "<") if newest else ("ASC", ">")
    where, values = "client = ? AND kind = ?", [client, kind]
    if after is not None:
        where += f" AND number {behind} (SELECT number FROM jobs WHERE id = ? AND client = ?)"
        values += [after, client]
    found = db.execute(
        f"SELECT * FROM jobs WHERE {where} ORDER BY number {order} LIMIT ?", (*values, limit)
    )
    return [as_job(row) for row in found.fetchall()]


def begin(db: Rows, id: str) -> None:
    """One more attempt, unless it has ended or was deleted."""
    changed = db.execute(
        "UPDATE jobs SET status = ? WHERE id = ? AND completed IS NULL", (RUNNING, id)
    ).rowcount
    if changed:
        db.execute(
            "INSERT INTO attempts (job, number, started) SELECT ?, count(*) + 1, ? FROM attempts"
            " WHERE job = ?", (id, time.time(), id),
        )  # fmt: skip


def end(
    db: Rows, id: str, status: str, error: tuple[str, str] | None = None, done_steps: int = 0,
    size: int = 0,
) -> bool:  # fmt: skip
    """Once: False, and nothing done, for a job that has ended or is not there."""
    code, message = error or (None, None)
    changed = db.execute(
        "UPDATE jobs SET status = ?, completed = ?, error_code = ?, error_message = ?,"
        " done_steps = ?, bytes = ? WHERE id = ? AND completed IS NULL",
        (status, time.time(), code, message, done_steps, size, id),
    ).rowcount
    if changed:
        _end_attempt(db, id, status)
    return bool(changed)


def leave(db: Rows, id: str) -> None:
    """Back into the queue, for the next start."""
    db.execute("UPDATE jobs SET status = ? WHERE id = ? AND completed IS NULL", (QUEUED, id))
    _end_attempt(db, id, LEFT)


def _end_attempt(db: Rows, id: str, outcome: str) -> None:
    db.execute(
        "UPDATE attempts SET ended = ?, outcome = ? WHERE job = ? AND outcome IS NULL",
        (time.time(), outcome, id),
    )


def known(db: Rows, job: Job, key: Key) -> Job | None:
    """See `JobStore.known`."""
    row = db.execute(
        "SELECT * FROM keys WHERE client = ? AND kind = ? AND key = ?",
        (job.client, job.kind, key.text),
    ).fetchone()
    if row is None:
        return None
    if row["fingerprint"] not in (None, key.fingerprint):
        raise KeyReusedError(
            "Idempotency-Key", "came with another request before; take a new key for a new one"
        )
    if row["job"] is not None:
        return read(db, row["job"])
    job = replace(job, status=CANCELLED, completed=time.time(), error=NEVER_STARTED)
    insert(db, job)
    remember(db, job, key)
    return job


def remember(db: Rows, job: Job, key: Key) -> None:
    db.execute(
        "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)",
        (job.client, job.kind, key.text, key.fingerprint, job.id, time.time()),
    )


def job_of_key(db: Rows, client: str, kind: str, text: str) -> str | None:
    row = db.execute(
        "SELECT job FROM keys WHERE client = ? AND kind = ? AND key = ?", (client, kind, text)
    ).fetchone()
    return None if row is None else row["job"]


def cancel_new_key(db: Rows, client: str, kind: str, text: str) -> None:
    """One that has no job: the request that brings it will be cancelled."""
    db.execute(
        "INSERT OR IGNORE INTO keys VALUES (?, ?, ?, NULL, NULL, ?)",
        (client, kind, text, time.time()),
    )


def delete(db: Rows, id: str) -> None:
    """By its client: its key stays, as a cancelled one."""
    db.execute("DELETE FROM jobs WHERE id = ?", (id,))
    db.execute("UPDATE keys SET job = NULL, created = ? WHERE job = ?", (time.time(), id))


def forget(db: Rows, keep: Retention) -> list[str]:
    """Ended jobs that are too old, too many or too large, with their keys; returns their ids."""
    now, forgotten = time.time(), []
    count, size = db.execute(
        "SELECT count(*), coalesce(sum(bytes), 0) FROM jobs WHERE completed IS NOT NULL"
    ).fetchone()
    for row in db.execute(
        "SELECT id, completed, bytes FROM jobs WHERE completed IS NOT NULL ORDER BY completed"
    ).fetchall():
        old = row["completed"] < now - keep.seconds
        if not (old or count > keep.jobs or size > keep.size):
            break
        db.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))
        db.execute("DELETE FROM keys WHERE job = ?", (row["id"],))
        forgotten.append(row["id"])
        count, size = count - 1, size - row["bytes"]
    seconds, most = CANCELLED_KEYS
    db.execute(
        "DELETE FROM keys WHERE job IS NULL AND (created < ? OR created <= (SELECT created FROM"
        " keys WHERE job IS NULL ORDER BY created DESC LIMIT 1 OFFSET ?))",
        (now - seconds, most),
    )
    return forgotten


def recover(db: Rows, most_attempts: int) -> list[Job]:
    """After a process has gone: every job, oldest first; those that ran wait again, but for those
    that were begun too often."""
    db.execute(
        "UPDATE attempts SET outcome = ?, ended = ? WHERE outcome IS NULL",
        (INTERRUPTED, time.time()),
    )
    db.execute("UPDATE jobs SET status = ? WHERE completed IS NULL", (QUEUED,))
    for row in db.execute(
        "SELECT job FROM attempts WHERE outcome = ? GROUP BY job HAVING count(*) >= ?",
        (INTERRUPTED, most_attempts),
    ).fetchall():
        message = f"the server ended {most_attempts} times while this ran; ask again, for less"
        end(db, row["job"], FAILED, (INTERRUPTED, message))
    return [as_job(row) for row in db.execute("SELECT * FROM jobs ORDER BY number").fetchall()]
