"""A name for every request, in its answer and in every line that is logged for it."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from gentron.runtime.http_errors import answer

log = logging.getLogger(__name__)
HEADER = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds; logged on errors


class RequestLog:
    """Outside of everything else. An error that nobody answered is answered here, as a defect."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if SANE.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        started, status = time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        with bound_contextvars(request_id=name):
            try:
                await self.app(scope, receive, named)
            except Exception as error:
                if status:  # part of an answer is out: the connection has to be cut
                    raise
                await answer(error)(scope, receive, named)
            finally:
                self._say(scope, status, time.perf_counter() - started)

    def _say(self, scope: Scope, status: int, seconds: float) -> None:
        quiet = scope["path"] in QUIET and status == 200
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={
                "method": scope["method"],
                "path": scope["path"],
                "status": status or None,  # none: the client went away first
                "seconds": round(seconds, 4),
                "client": scope.get("state", {}).get("client"),
            },
        )
