"""Jobs that outlive the request that made them: what is kept of each, and where.

`JobStore` is what the routes and the runner know. This one is in memory, bounded by number and
age; what survives a restart is another.
"""

from __future__ import annotations

import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from gentron.errors import RequestError

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = (
    "queued", "in_progress", "completed", "failed", "cancelled"
)  # fmt: skip
ENDED = (COMPLETED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """A video on its way, as values."""

    id: str
    client: str  # whose it is: nobody else sees it
    settings: dict[str, Any]  # of `runtime.result.Settings`: enough to run it (again)
    fps: float
    created: float  # seconds since 1970
    status: str = QUEUED
    steps: int = 0
    done_steps: int = 0
    completed: float | None = None
    error: tuple[str, str] | None = None  # code and message
    priority: int = 0
    deadline: float | None = None  # seconds since 1970

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def progress(self) -> int:
        """In percent; the last one is for the file."""
        if self.status == COMPLETED:
            return 100
        return min(99, 99 * self.done_steps // max(1, self.steps))


def new_job_id() -> str:
    return f"video_{secrets.token_hex(16)}"


class JobStore(ABC):
    """May be called from any thread. A job is seen by its client alone."""

    @abstractmethod
    def add(self, job: Job) -> None: ...

    @abstractmethod
    def get(self, id: str, client: str) -> Job | None: ...

    @abstractmethod
    def update(self, id: str, **changes: Any) -> Job | None:
        """None if it was deleted meanwhile; an ended job stays as it is."""

    @abstractmethod
    def finish(self, id: str, content: bytes) -> Job | None:
        """Completes it with its file; None if it was deleted meanwhile."""

    @abstractmethod
    def content(self, id: str) -> bytes | None: ...

    @abstractmethod
    def delete(self, id: str, client: str) -> Job | None: ...

    @abstractmethod
    def of_client(self, client: str) -> list[Job]:
        """Newest first."""


class MemoryJobStore(JobStore):
    """Forgets ended jobs when there are more than `most`, more bytes than `most_bytes`, or after
    `seconds`."""

    def __init__(self, most: int = 256, most_bytes: int = 1 << 28, seconds: float = 3600.0):
        self._most, self._most_bytes, self._seconds = most, most_bytes, seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._contents: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def add(self, job: Job) -> None:
        with self._lock:
            self._forget()
            self._jobs[job.id] = job

    def get(self, id: str, client: str) -> Job | None:
        with self._lock:
            self._forget()
            job = self._jobs.get(id)
            return job if job is not None and job.client == client else None

    def update(self, id: str, **changes: Any) -> Job | None:
        with self._lock:
            job = self._jobs.get(id)
            if job is None or job.ended:
                return job
            self._jobs[id] = replace(job, **changes)
            return self._jobs[id]

    def finish(self, id: str, content: bytes) -> Job | None:
        with self._lock:
            job = self._jobs.get(id)
            if job is None or job.ended:
                return job
            self._contents[id] = content
            self._jobs[id] = replace(job, status=COMPLETED, completed=time.time())
            self._forget()
            return self._jobs.get(id)

    def content(self, id: str) -> bytes | None:
        with self._lock:
            return self._contents.get(id)

    def delete(self, id: str, client: str) -> Job | None:
        with self._lock:
            job = self._jobs.get(id)
            if job is None or job.client != client:
                return None
            self._drop(id)
            return job

    def of_client(self, client: str) -> list[Job]:
        with self._lock:
            self._forget()
            return [job for job in reversed(self._jobs.values()) if job.client == client]

    def _forget(self) -> None:
        old = time.time() - self._seconds
        for job in list(self._jobs.values()):
            too_many = len(self._jobs) > self._most
            too_large = sum(map(len, self._contents.values())) > self._most_bytes
            too_old = (job.completed or job.created) < old
            if job.ended and (too_many or too_large or too_old):
                self._drop(job.id)

    def _drop(self, id: str) -> None:
        del self._jobs[id]
        self._contents.pop(id, None)


def check_job_id(id: str) -> str:
    """Raises RequestError for what cannot be one; nothing of it is used as a path."""
    if not id.startswith("video_") or not id[6:].isalnum() or len(id) > 64 or not id.isascii():
        raise RequestError("video_id", "is not the id of a video")
    return id
