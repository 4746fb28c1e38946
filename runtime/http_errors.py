"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gentron.errors import (
    BackendError,
    BundleError,
    BusyError,
    CancelledError,
    DeadlineError,
    GenTronError,
    KeyReusedError,
    NonFiniteError,
    OutputError,
    RefusedError,
    RequestError,
    ResourceError,
    StorageError,
)

log = logging.getLogger(__name__)
STATUS: tuple[tuple[type[GenTronError], int, str], ...] = (
    # Not 409, after which OpenAI's client tries again.
    (KeyReusedError, 422, "idempotency_key_reused"),
    (RequestError, 400, "invalid_request"),
    (RefusedError, 400, "content_policy_violation"),
    (BusyError, 429, "busy"),
    (DeadlineError, 503, "deadline"),
    (CancelledError, 503, "cancelled"),
    (ResourceError, 507, "out_of_memory"),
    (StorageError, 507, "storage"),
    (OutputError, 507, "storage"),
    (NonFiniteError, 500, "not_finite"),
    (BackendError, 500, "backend"),
    (BundleError, 500, "bundle"),
)


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and the body for any error. One that is a defect is logged, and says nothing
    of itself."""
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            param = error.field if isinstance(error, RequestError) else None
            return status, body(str(error), status, code, param)
    log.error("an error that is no message to a client", exc_info=error)
    return 500, body("internal error; the server's log has it", 500, "internal")


def body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: Exception) -> JSONResponse:
    status, content = described(error)
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(content, status, headers=headers)


def install(app: FastAPI) -> None:
    @app.exception_handler(GenTronError)
    async def ours(_: Request, error: GenTronError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        more = len(error.errors()) - 1
        message = f"{where or 'body'}: {first['msg']}" + (f" (and {more} more)" if more else "")
        return JSONResponse(body(message, 400, "invalid_request", where or None), 400)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        content = body(str(error.detail), error.status_code, "http")
        return JSONResponse(content, error.status_code, headers=error.headers)
