"""Runs jobs on the service: what becomes of each is written into the store."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from pathlib import Path

from gentron.errors import CancelledError, GenTronError
from gentron.runtime.jobs import CANCELLED, FAILED, RUNNING, Job, JobStore
from gentron.runtime.result import Result, Settings
from gentron.runtime.service import Service
from gentron.runtime.ticket import Ticket
from gentron.runtime.video_file import VideoFile

log = logging.getLogger(__name__)


class JobRunner:
    """Belongs to one event loop."""

    def __init__(self, service: Service, store: JobStore):
        self._service, self.store = service, store
        self._tickets: dict[str, Ticket] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, service: Service) -> None:
        """For jobs that start from now on; those under way stay where they are."""
        self._service = service

    def start(self, job: Job) -> None:
        """Submits it and stores it; raises as `Service.submit` does, with nothing stored."""
        left = None if job.deadline is None else job.deadline - time.time()
        ticket = self._service.submit(
            Settings(**job.settings), client=job.client, priority=job.priority, deadline=left
        )
        self.store.add(job)
        self._tickets[job.id] = ticket
        task = asyncio.create_task(self._follow(job, ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, id: str) -> None:
        """Before its next step; nothing if it has ended."""
        if ticket := self._tickets.get(id):
            ticket.cancel()

    async def close(self) -> None:
        """Cancels what runs."""
        for ticket in list(self._tickets.values()):
            ticket.cancel()
        await asyncio.gather(*self._tasks)

    async def _follow(self, job: Job, ticket: Ticket) -> None:
        try:
            async for step in ticket:
                self.store.update(job.id, status=RUNNING, done_steps=step.index + 1)
            result = await ticket.result()
            content = await asyncio.to_thread(video_bytes, result, job.fps)
        except CancelledError as error:
            self._fail(job, CANCELLED, "cancelled", str(error))
        except GenTronError as error:
            self._fail(job, FAILED, type(error).__name__, str(error))
        except Exception:
            log.exception("job %s", job.id)
            self._fail(job, FAILED, "internal", "internal error; the server's log has it")
        else:
            self.store.finish(job.id, content)
        finally:
            del self._tickets[job.id]

    def _fail(self, job: Job, status: str, code: str, message: str) -> None:
        self.store.update(job.id, status=status, error=(code, message), completed=time.time())


def video_bytes(result: Result, fps: float) -> bytes:
    """An MP4 of the first sample, with its settings. Raises OutputError."""
    with tempfile.TemporaryDirectory(prefix="gentron-") as folder:
        file = Path(folder) / "video.mp4"
        metadata = {**result.metadata(0), "fps": fps}
        with VideoFile(metadata, output=file, name="video", fps=fps, format="mp4") as video:
            for frame in result.videos[0]:
                video.write(frame)
        return file.read_bytes()
