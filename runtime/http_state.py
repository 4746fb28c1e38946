"""What the routes share: the service, the jobs, who asks, and noticing that they have gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from fastapi import Request

from gentron.errors import RequestError
from gentron.runtime.http_guard import Gate
from gentron.runtime.job_runner import JobRunner
from gentron.runtime.service import Service
from gentron.runtime.ticket import Ticket

log = logging.getLogger(__name__)


@dataclass
class ServerState:
    """One for an application, as `app.state.gentron`."""

    service: Service
    runner: JobRunner
    ready: bool = False  # warmed up, and not draining
    gate: Gate = field(default_factory=Gate)
    log_prompts: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, request: Request) -> ServerState:
        return cast(ServerState, request.app.state.gentron)

    @property
    def model(self) -> str:
        return self.service.pipeline.bundle.manifest.name

    def note(self, what: str, prompt: str, negative: str = "") -> None:
        """Prompts are logged only where the operator asked for it."""
        if self.log_prompts:
            log.info("%s", what, extra={"prompt": prompt, "negative": negative})

    def check_model(self, model: str | None) -> None:
        """Raises RequestError for another than the one that is served."""
        if model is not None and model != self.model:
            raise RequestError("model", f"{model[:80]!r} is not served here; use {self.model!r}")


def client_of(request: Request) -> str:
    """Whom the work is done for: what authentication found, else the address."""
    found = getattr(request.state, "client", None)
    if found is not None:
        return str(found)
    return request.client.host if request.client else ""


@asynccontextmanager
async def client_gone(request: Request, ticket: Ticket) -> AsyncIterator[None]:
    """Cancels the ticket if the client closes the connection meanwhile."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
