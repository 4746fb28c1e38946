"""What stands before every route: who asks, whether the server still takes work, how large a body.

Plain ASGI, so that a client that goes away is noticed behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gentron.runtime.http_access import READING, Access, Refusal
from gentron.runtime.http_errors import body

MAX_BODY = 1 << 17  # bytes; a prompt and its settings take a few thousand
DRAINING = Refusal(
    503, "draining", "the server is ending; ask again, another one takes its place",
    {"Retry-After": "5"},
)  # fmt: skip


@dataclass
class Gate:
    """What the guard shows and is told."""

    draining: bool = False  # no more work is let through
    answering: int = 0  # requests for work that are not answered to the end


class Guard:
    """`refused` is told the code of every refusal."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access | None = None,
        gate: Gate | None = None,
        refused: Callable[[str], None] = lambda code: None,
        max_body: int = MAX_BODY,
    ):
        self.app, self.access, self.max_body = app, access or Access(), max_body
        self.gate, self.refused = gate or Gate(), refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none here, so none passes unasked
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        headers = Headers(scope=scope)
        client, refusal = self.access.judge(scope["method"], scope["path"], headers.get, address)
        scope.setdefault("state", {})["client"] = client
        if refusal is None and scope["method"] not in READING and self.gate.draining:
            refusal = DRAINING
        content = b"" if refusal else await self._body(receive)
        if content is None:
            return
        if len(content) > self.max_body:
            refusal = Refusal(413, "too_large", f"body: at most {self.max_body} bytes")
        if refusal:
            self.refused(refusal.code)
            error = body(refusal.message, refusal.status, refusal.code)
            # What the client still sends is not read, so the connection cannot be used again.
            close = {} if scope["method"] in READING else {"Connection": "close"}
            answer = JSONResponse(error, refusal.status, headers={**refusal.headers, **close})
            await answer(scope, receive, send)
            return
        works = scope["method"] not in READING
        self.gate.answering += works
        try:
            await self.app(scope, _replay(content, receive), send)
        finally:
            self.gate.answering -= works

    async def _body(self, receive: Receive) -> bytes | None:
        """Not much more than allowed; None if the client went away."""
        parts, size, more = [], 0, True
        while more and size <= self.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
        return b"".join(parts)


def _replay(content: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes after it: that the client went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return again
