"""Jobs that outlive the request that made them, as values."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gentron.errors import RequestError
from gentron.runtime.result import Settings

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = (
    "queued", "in_progress", "completed", "failed", "cancelled"
)  # fmt: skip
ENDED = (COMPLETED, FAILED, CANCELLED)
VIDEO, IMAGE = "video", "image"
ID_BYTES = 16
MAX_KEY = 255  # characters of an idempotency key
MEDIA = {"mp4": "video/mp4", "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class Job:
    """A video or pictures on their way."""

    id: str
    kind: str  # VIDEO or IMAGE
    client: str  # whose it is: nobody else sees it
    settings: dict[str, Any]  # of `runtime.result.Settings`: enough to run it (again)
    output: dict[str, Any]  # of the files: format; fps of a video, compression of a picture
    model: str
    digest: str  # of the bundle that it was accepted for
    created: float  # seconds since 1970
    status: str = QUEUED
    done_steps: int = 0
    completed: float | None = None  # when it ended, however it did
    error: tuple[str, str] | None = None  # code and message
    priority: int = 0
    deadline: float | None = None  # seconds since 1970

    @property
    def steps(self) -> int:
        return int(self.settings["steps"])

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def progress(self) -> int:
        """In percent; the last one is for the file."""
        if self.status == COMPLETED:
            return 100
        return min(99, 99 * self.done_steps // max(1, self.steps))

    @property
    def media_type(self) -> str:
        return MEDIA[self.output["format"]]

    def request(self) -> Settings:
        """Its settings as the service takes them, also after they were JSON."""
        interval = self.settings.get("guidance_interval")
        return Settings(
            **self.settings | {"guidance_interval": None if interval is None else tuple(interval)}
        )


class Key(NamedTuple):
    """An idempotency key, and a digest of the body that came with it."""

    text: str
    fingerprint: str


@dataclass(frozen=True)
class Retention:
    """How long jobs are kept after they end, at most; those that ended first go first."""

    seconds: float
    size: int  # bytes of all results together
    jobs: int = field(default=10_000)


IN_MEMORY = Retention(3600.0, 1 << 28, 256)
ON_DISK = Retention(24 * 3600.0, 10_000_000_000)


def new_job_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(ID_BYTES)}"


def check_job_id(kind: str, id: str) -> str:
    """Raises RequestError for what cannot be one; nothing of it is used as a path."""
    if not re.fullmatch(rf"{kind}_[0-9a-zA-Z]{{1,{2 * ID_BYTES}}}", id):
        raise RequestError(f"{kind}_id", f"is not the id of a {kind}")
    return id


def check_key(text: str) -> str:
    """Raises RequestError for an idempotency key that is not kept as one."""
    if not re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_KEY}}}", text):
        raise RequestError(
            "Idempotency-Key", f"must be 1 to {MAX_KEY} visible ASCII letters; a UUID is a good one"
        )
    return text
