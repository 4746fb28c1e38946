"""The HTTP server: OpenAI's images and videos, the page at `/`, health, metrics.

One application for one `Service`. Whatever concerns every request (limits, who asks) is in
`http_guard.py`, errors are in `http_errors.py`, metrics in `metrics.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import gentron
from gentron.errors import GenTronError, RequestError
from gentron.runtime import http_errors, http_images, http_page, http_videos
from gentron.runtime.http_access import Access
from gentron.runtime.http_guard import Gate, Guard
from gentron.runtime.http_log import RequestLog
from gentron.runtime.http_models import VideoRequest
from gentron.runtime.http_reload import Reloader
from gentron.runtime.http_state import ServerState
from gentron.runtime.job_runner import JobRunner
from gentron.runtime.job_store import JobStore
from gentron.runtime.metrics import Metrics
from gentron.runtime.service import Service

log = logging.getLogger(__name__)
Size = tuple[int, int]


def create_app(
    open_service: Callable[[], Service],
    metrics: Metrics,
    warm_up: Iterable[Size] = (),
    store: JobStore | None = None,
    access: Access | None = None,
    *,
    log_prompts: bool = False,
) -> FastAPI:
    """`open_service` is called when the server starts, and again for a reload; a service is closed
    when the server ends or another has taken its place. `/readyz` answers yes once the sizes of
    `warm_up` in pixels were drawn. Jobs are kept in `store`, by default in memory; those that it
    has left over go on after the warm-up, and it is closed when the server ends."""
    sizes, gate, jobs = list(warm_up), Gate(), JobStore() if store is None else store

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = open_service()
        runner = JobRunner(service, jobs)
        state = app.state.gentron = ServerState(service, runner, gate=gate, log_prompts=log_prompts)
        reloader = app.state.reloader = Reloader(state, open_service, sizes, metrics)
        metrics.serves(service.pipeline.bundle.manifest.name, service.pipeline.bundle.digest)

        task = asyncio.create_task(_make_ready(state, sizes))
        try:
            yield
        finally:
            state.ready = False
            task.cancel()
            await runner.close()
            await reloader.close()
            await state.service.close()
            await asyncio.to_thread(jobs.close)

    app = FastAPI(
        title="GenTron",
        version=gentron.__version__,
        lifespan=lifespan,
        # Their pages run scripts from elsewhere, beside the page that people give their key to.
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = metrics
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    app.add_middleware(
        Guard,
        access=access,
        gate=gate,
        refused=metrics.refused,
    )
    app.add_middleware(RequestLog)
    http_errors.install(app)
    app.include_router(http_images.router)
    app.include_router(http_videos.router)
    app.include_router(http_page.router)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one that is served."""
        return {"object": "list", "data": [_model(ServerState.of(request))]}

    @app.get("/v1/models/{model}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        state = ServerState.of(request)
        if model != state.model:
            raise RequestError("model", f"{model[:80]!r} is not served here; use {state.model!r}")
        return _model(state)

    @app.get("/healthz")
    async def health(request: Request) -> Response:
        """Whether the process works; 503 once its scheduler has ended."""
        healthy = ServerState.of(request).service.healthy
        return JSONResponse({"healthy": healthy}, 200 if healthy else 503)

    @app.get("/readyz")
    async def readiness(request: Request) -> Response:
        """Whether to send requests here: after the warm-up, until the server drains."""
        state = ServerState.of(request)
        ready = state.ready and state.service.healthy
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        """For Prometheus."""
        return PlainTextResponse(metrics.render(), media_type=metrics.content_type)

    return app


async def _make_ready(state: ServerState, sizes: Iterable[Size]) -> None:
    try:
        await state.service.warm_up(sizes)
    except GenTronError as error:
        log.error("not ready: the warm-up failed: %s", error)
    else:
        state.ready = not state.gate.draining
        await state.runner.resume()


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with what `/v1/videos` reads by hand."""
    if not app.openapi_schema:
        described = FastAPI.openapi(app)
        models = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = described["components"]["schemas"]
        schemas.update(models.pop("$defs", {}))
        schemas["VideoRequest"] = models
    return app.openapi_schema or {}


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "gentron",
        "gentron": http_page.abilities(state.service),
    }
