"""What is known of every job: its state in a database, its results in files.

With a folder, both survive the process: whatever is answered about a job is on the disk first. A
job ends once, in the transaction that also ends its attempt; its files are there before. Without a
folder both are in memory.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from gentron.errors import StorageError
from gentron.runtime import job_rows
from gentron.runtime.job_database import JobDatabase
from gentron.runtime.job_files import FolderFiles, JobFiles, MemoryFiles, sync_folder
from gentron.runtime.job_rows import Rows
from gentron.runtime.jobs import COMPLETED, FAILED, IN_MEMORY, ON_DISK, Job, Key, Retention

log = logging.getLogger(__name__)
MOST_ATTEMPTS = 10  # in which the process may end while a job runs
FORGET_EVERY = 30.0  # seconds


class JobStore:
    """May be called from any thread; waits for the disk, so not from an event loop's. A job is
    seen by its client alone. Every method raises StorageError where the disk does not do it."""

    def __init__(
        self,
        folder: Path | None = None,
        keep: Retention | None = None,
        most_attempts: int = MOST_ATTEMPTS,
    ):
        """`left_over` are the jobs that the last process did not end, oldest first. Raises
        StorageError if another process has the folder, or it cannot be used."""
        self.keep = keep or (IN_MEMORY if folder is None else ON_DISK)
        self._done_steps: dict[str, int] = {}  # of those that run
        self._unsaved: dict[str, Job] = {}  # ended, while the disk was full
        self._doomed: list[str] = []  # whose files go when the transaction is over
        self._forgot = float("-inf")
        self._database = JobDatabase(folder)
        try:
            self._files: JobFiles = MemoryFiles()
            if folder is not None:
                self._files = FolderFiles(folder / "results")
                sync_folder(folder)
            self.left_over = self._recover(most_attempts)
        except BaseException as error:
            self._database.close()
            if isinstance(error, OSError):
                raise _failure(error) from error
            raise

    def known(self, job: Job, key: Key) -> Job | None:
        """The job that was made with this key before; `job` itself, cancelled, if the key was
        cancelled before; None for a new key. Raises KeyReusedError if it came with another body."""
        with self._transaction() as db:
            found = job_rows.known(db, job, key)
            return None if found is None else self._seen(found)

    def add(self, job: Job, key: Key | None = None) -> Job:
        """On the disk when it returns; what is `known` of its key comes first."""
        with self._transaction() as db:
            if key is not None and (found := job_rows.known(db, job, key)):
                return self._seen(found)
            self._forget(db)
            job_rows.insert(db, job)
            if key is not None:
                job_rows.remember(db, job, key)
            return job

    def begin(self, id: str) -> None:
        """Records that it runs; a full disk does not keep it from that."""
        try:
            with self._transaction() as db:
                job_rows.begin(db, id)
        except StorageError as error:
            log.warning("job %s runs, unrecorded: %s", id, error)

    def progress(self, id: str, done_steps: int) -> None:
        """In memory until the job ends: after a restart it begins anew. Does not wait."""
        self._done_steps[id] = done_steps

    def finish(self, id: str, contents: Sequence[bytes]) -> bool:
        """Completes it with its files; False if it has ended or was deleted meanwhile."""
        size = sum(map(len, contents))
        if size > self.keep.size:
            raise StorageError(
                f"the result has {size} bytes, and {self.keep.size} are kept here; ask for less, "
                "or start the server with more --keep-bytes"
            )
        with self._database.cursor() as db:
            job = job_rows.read(db, id)
        if job is None or self._seen(job).ended:
            return False
        try:
            self._files.write(id, contents)
        except OSError as error:
            raise _failure(error) from error
        try:
            with self._transaction() as db:
                ended = job_rows.end(db, id, COMPLETED, done_steps=job.steps, size=size)
                self._forget(db)
        except BaseException:
            self._files.remove(id)
            raise
        if not ended:
            self._files.remove(id)
        self._done_steps.pop(id, None)
        return ended

    def fail(self, id: str, code: str, message: str, status: str = FAILED) -> None:
        """Nothing for one that has ended or was deleted. Where the disk does not take it, it is so
        in memory, and written as soon as there is space."""
        done = self._done_steps.get(id, 0)
        try:
            with self._transaction() as db:
                job_rows.end(db, id, status, (code, message), done)
        except StorageError as error:
            log.warning("job %s ended as %s, not recorded yet: %s", id, status, error)
            with self._database.cursor() as db:
                job = job_rows.read(db, id)
                if job is not None and not job.ended:
                    self._unsaved[id] = replace(
                        job, status=status, error=(code, message), done_steps=done,
                        completed=time.time(),
                    )  # fmt: skip
        self._done_steps.pop(id, None)

    def leave(self, id: str) -> None:
        """This process ends before the job does; the next one goes on with it."""
        try:
            with self._transaction() as db:
                job_rows.leave(db, id)
        except StorageError as error:
            log.warning("job %s goes on at the next start, unrecorded: %s", id, error)
        self._done_steps.pop(id, None)

    def get(self, id: str, client: str) -> Job | None:
        self._forget_sometimes()
        with self._database.cursor() as db:
            job = job_rows.read(db, id)
            return self._seen(job) if job is not None and job.client == client else None

    def page(
        self, client: str, kind: str, limit: int, after: str | None = None, newest: bool = True
    ) -> list[Job]:
        """The client's own, at most `limit`, those behind `after`; none if that is not theirs."""
        self._forget_sometimes()
        with self._database.cursor() as db:
            found = job_rows.page(db, client, kind, limit, after, newest)
            return [self._seen(job) for job in found]

    def open(self, id: str, index: int) -> BinaryIO | None:
        """A file of a completed job."""
        return self._files.open(id, index)

    def delete(self, id: str, client: str) -> Job | None:
        """Returns what it was. Its idempotency key stays, as a cancelled one."""
        with self._transaction() as db:
            return self._delete(db, id, client)

    def cancel_key(self, client: str, kind: str, text: str) -> Job | None:
        """As `delete`, for the job of a key. Where there is none yet, the request that comes with
        that key is cancelled when it arrives."""
        with self._transaction() as db:
            if (id := job_rows.job_of_key(db, client, kind, text)) is not None:
                return self._delete(db, id, client)
            job_rows.cancel_new_key(db, client, kind, text)
            return None

    def close(self) -> None:
        """Idempotent."""
        if self._unsaved:
            try:
                with self._transaction():
                    pass
            except StorageError as error:
                log.error("%d jobs will run again: %s", len(self._unsaved), error)
                self._unsaved.clear()
        self._database.close()

    def _delete(self, db: Rows, id: str, client: str) -> Job | None:
        job = job_rows.read(db, id)
        if job is None or job.client != client:
            return None
        job_rows.delete(db, id)
        self._doomed.append(id)
        return self._seen(job)

    def _seen(self, job: Job) -> Job:
        """With what is not in the database."""
        if job.ended:
            return job
        if job.id in self._unsaved:
            return self._unsaved[job.id]
        return replace(job, done_steps=self._done_steps.get(job.id, 0))

    def _forget_sometimes(self) -> None:
        """Nobody is told that a job is old because the disk is full."""
        if time.monotonic() - self._forgot < min(FORGET_EVERY, self.keep.seconds / 10):
            return
        try:
            with self._transaction() as db:
                self._forget(db)
        except StorageError as error:
            log.warning("old jobs stay: %s", error)

    def _forget(self, db: Rows) -> None:
        self._forgot = time.monotonic()
        self._doomed += job_rows.forget(db, self.keep)

    @contextmanager
    def _transaction(self) -> Iterator[Rows]:
        """With what could not be written before; afterwards the files of dropped jobs go."""
        with self._database.cursor():  # all of it is one thread's
            try:
                with self._database.transaction() as db:
                    for job in self._unsaved.values():
                        job_rows.end(db, job.id, job.status, job.error, job.done_steps)
                    yield db
                self._unsaved.clear()
            except BaseException:
                self._doomed.clear()
                raise
            doomed, self._doomed = self._doomed, []
        for id in doomed:
            self._done_steps.pop(id, None)
            try:
                self._files.remove(id)
            except OSError as error:
                log.warning("the files of job %s stay until the next start: %s", id, error)

    def _recover(self, most_attempts: int) -> list[Job]:
        """The jobs to go on with; what belongs to none is removed."""
        with self._transaction() as db:
            self._forget(db)
            jobs = job_rows.recover(db, most_attempts)
        removed = self._files.keep_only({job.id for job in jobs if job.status == COMPLETED})
        left = [job for job in jobs if not job.ended]
        if removed or left:
            log.info("jobs: %d go on, %d unfinished results were removed", len(left), removed)
        return left


def _failure(error: OSError) -> StorageError:
    what = f"{error.strerror or error}: {error.filename or 'results of jobs'}"
    advice = "check the folder of --jobs"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, or keep less (--keep-bytes, --keep-hours)"
    return StorageError(f"jobs: {what}; {advice}")
