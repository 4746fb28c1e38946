"""Runs jobs on the service: what becomes of each is written into the store."""

from __future__ import annotations

import asyncio
import logging
import time

from gentron.errors import BusyError, CancelledError, GenTronError
from gentron.runtime.http_errors import described
from gentron.runtime.job_output import output_files
from gentron.runtime.job_store import JobStore
from gentron.runtime.jobs import CANCELLED, FAILED, Job, Key
from gentron.runtime.service import Service
from gentron.runtime.ticket import Ticket

log = logging.getLogger(__name__)


class JobRunner:
    """Belongs to one event loop, which never waits for the disk here."""

    def __init__(self, service: Service, store: JobStore):
        self._service, self.store = service, store
        self._tickets: dict[str, Ticket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._begun_enough = False

    def use(self, service: Service) -> None:
        """For jobs that start from now on; those under way stay where they are."""
        self._service = service

    async def start(self, job: Job, key: Key | None = None) -> Job:
        """Submits it and stores it; the job that its key made before, if there is one. Raises as
        `Service.submit` does, KeyReusedError and StorageError, with nothing stored."""
        if key is not None and (found := await asyncio.to_thread(self.store.known, job, key)):
            return found
        if self._closing:
            raise CancelledError("the server is ending; ask again")
        ticket = self._submit(job)
        try:
            stored = await asyncio.to_thread(self.store.add, job, key)
        except BaseException:
            self._withdraw(job.id)
            raise
        if stored.id != job.id or stored.ended:  # its key came, or was cancelled, meanwhile
            self._withdraw(job.id)
        else:
            self._watch(job, ticket)
        return stored

    async def resume(self) -> None:
        """Goes on with what the last process left, in the order in which it came."""
        waiting = self.store.left_over
        while waiting and not self._begun_enough:
            try:
                await self._resume(waiting[0])
            except BusyError as error:
                await asyncio.sleep(min(1.0, error.retry_after))
                continue
            except CancelledError:  # the service is closed: for the next start
                return
            except GenTronError as error:
                await self._fail_with(waiting[0], error)
            waiting.pop(0)

    async def _resume(self, job: Job) -> None:
        now = await asyncio.to_thread(self.store.get, job.id, job.client)
        if now is None or now.ended:  # by its client, meanwhile
            return
        if job.digest == self._service.pipeline.bundle.digest:
            self._watch(job, self._submit(job))
        else:
            message = "this server has another bundle by now; ask again"
            await self._fail(job, FAILED, "bundle_changed", message)

    def cancel(self, id: str) -> None:
        """Before its next step; nothing if it has ended."""
        if ticket := self._tickets.get(id):
            ticket.cancel()

    def begin_no_more(self) -> None:
        """The server ends: what the last process left is for the next one."""
        self._begun_enough = True

    async def close(self) -> None:
        """Stops what runs, for the next start to go on with."""
        self._closing = self._begun_enough = True
        for ticket in list(self._tickets.values()):
            ticket.cancel()
        await asyncio.gather(*self._tasks)

    def _submit(self, job: Job) -> Ticket:
        left = None if job.deadline is None else job.deadline - time.time()
        ticket = self._tickets[job.id] = self._service.submit(
            job.request(), client=job.client, priority=job.priority, deadline=left
        )
        return ticket

    def _withdraw(self, id: str) -> None:
        self._tickets.pop(id).cancel()

    def _watch(self, job: Job, ticket: Ticket) -> None:
        task = asyncio.create_task(self._follow(job, ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, job: Job, ticket: Ticket) -> None:
        store = self.store
        try:
            await ticket.started()
            await asyncio.to_thread(store.begin, job.id)
            async for step in ticket:
                store.progress(job.id, step.index + 1)
            result = await ticket.result()
            contents = await asyncio.to_thread(output_files, result, job)
            await asyncio.to_thread(store.finish, job.id, contents)
        except CancelledError as error:
            if self._closing:
                await asyncio.to_thread(store.leave, job.id)
            else:
                await self._fail(job, CANCELLED, "cancelled", str(error))
        except Exception as error:
            await self._fail_with(job, error)
        finally:
            del self._tickets[job.id]

    async def _fail_with(self, job: Job, error: Exception) -> None:
        """As a request that waits for its answer would have been told; a defect is logged."""
        found = described(error)[1]["error"]
        await self._fail(job, FAILED, found["code"], found["message"])

    async def _fail(self, job: Job, status: str, code: str, message: str) -> None:
        await asyncio.to_thread(self.store.fail, job.id, code, message, status)
