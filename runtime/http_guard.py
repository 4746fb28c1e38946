"""What stands before every route: the size of a body. The place for keys and rates as well.

Plain ASGI, so that a client that goes away is noticed behind it.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gentron.runtime.http_errors import body

MAX_BODY = 1 << 17  # bytes; a prompt and its settings take a few thousand


class Guard:
    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY):
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.max_body:
                content = body(f"body: at most {self.max_body} bytes", 413, "too_large")
                await JSONResponse(content, 413, headers={"Connection": "close"})(
                    scope, receive, send
                )
                return
        await self.app(scope, _replay(b"".join(parts), receive), send)


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
