"""Where `gentron-serve` keeps its jobs, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gentron.cli.common import Bytes, gathered

if TYPE_CHECKING:
    from gentron.runtime.job_store import JobStore

Command = Callable[..., None]
OPTIONS = (
    click.option("--jobs", "jobs_folder", type=click.Path(path_type=Path, file_okay=False),
                 metavar="FOLDER", help="Keep jobs and results there, across restarts [memory]."),
    click.option("--keep-hours", type=click.FloatRange(min=0, min_open=True),
                 help="A job that ended [24; in memory 1]."),
    click.option("--keep-bytes", type=Bytes(),
                 help="Results in all, such as 10GB; the oldest go [10GB; in memory 256MiB]."),
    click.option("--job-attempts", type=click.IntRange(1),
                 help="Give a job up after the process was killed so often while it ran [10]."),
)  # fmt: skip


@dataclass(frozen=True)
class JobChoice:
    jobs_folder: Path | None
    keep_hours: float | None
    keep_bytes: int | None
    job_attempts: int | None

    def open(self) -> JobStore:
        """Raises StorageError if another server has the folder, or it cannot be used."""
        from gentron.runtime.job_store import MOST_ATTEMPTS, JobStore
        from gentron.runtime.jobs import IN_MEMORY, ON_DISK, Retention

        usual = IN_MEMORY if self.jobs_folder is None else ON_DISK
        keep = Retention(
            usual.seconds if self.keep_hours is None else 3600 * self.keep_hours,
            usual.size if self.keep_bytes is None else self.keep_bytes,
            usual.jobs,
        )
        return JobStore(self.jobs_folder, keep, self.job_attempts or MOST_ATTEMPTS)


def job_options(command: Command) -> Command:
    """As one `JobChoice`."""
    return gathered(command, "jobs", JobChoice, OPTIONS)
