"""`POST /v1/images/generations`: whole, as server-sent events, or as a job (`http_jobs.py`)."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gentron.errors import RequestError
from gentron.runtime.http_errors import described
from gentron.runtime.http_jobs import KEY, Asked, add_job_routes, job_file, start_job
from gentron.runtime.http_models import ImageRequest, pixels, preview_steps
from gentron.runtime.http_state import ServerState, client_gone, client_of
from gentron.runtime.job_output import Picture, picture_bytes
from gentron.runtime.jobs import IMAGE
from gentron.runtime.result import Result
from gentron.runtime.ticket import Ticket

router = APIRouter()
WHEN = ("priority", "deadline")  # to run it; the others say what it is
KEEP_ALIVE = 15.0  # seconds without an event after which a comment is sent
# OpenAI counts tokens; there is nothing here to bill.
NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@router.post("/v1/images/generations", responses={202: {"description": "A job, with gentron.job"}})
async def generate(
    body: ImageRequest, request: Request, key: str | None = Header(None, alias=KEY)
) -> Response:
    """Pictures for a prompt. With `stream`, events: partial images, then the picture. Closing the
    connection cancels the request before its next step. With `gentron.job`, a job at once; ask
    `GET /v1/images/{id}` how far it is."""
    state = ServerState.of(request)
    state.check_model(body.model)
    if body.stream and (body.n or 1) != 1:
        raise RequestError("stream", "streams one image at a time; use n = 1, or no stream")
    own = body.gentron
    previews = body.partial_images or 0
    if own is not None and own.previews is not None:
        if body.partial_images is not None:
            raise RequestError("previews", "give either `partial_images` or `gentron.previews`")
        previews = own.previews
    if previews and not body.stream:
        raise RequestError("partial_images", "come in a stream only; ask for stream = true")
    options = own.settings() if own else {}
    if own and own.job:
        return await _start(body, request, key, options)
    if key is not None:
        raise RequestError(KEY, "is for jobs; ask for one with gentron.job, or leave it out")
    steps = options.get("steps") or state.service.pipeline.bundle.manifest.defaults.steps
    ticket = state.service.submit(
        body.prompt,
        batch=body.n or 1,
        size=pixels(body.size),
        client=client_of(request),
        previews=preview_steps(previews, steps),
        **options,
    )
    state.note(ticket.id, body.prompt, options.get("negative", ""))
    if body.stream:
        return StreamingResponse(
            _events(ticket, body),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
    async with ticket, client_gone(request, ticket):
        result = await ticket.result()
    data = await asyncio.to_thread(_encoded, result, body)
    content = {"created": int(time.time()), "data": data, **_shared(body, result)}
    return JSONResponse(content)


async def _start(
    body: ImageRequest, request: Request, key: str | None, options: dict[str, Any]
) -> Response:
    if body.stream:
        raise RequestError("stream", "is not for jobs; leave it out, or gentron.job")
    options = {name: value for name, value in options.items() if name not in WHEN}
    settings = ServerState.of(request).service.pipeline.settings(
        body.prompt, batch=body.n or 1, size=pixels(body.size), **options
    )
    asked = Asked(IMAGE, body, settings, _output(body), body.gentron)
    return await start_job(request, asked, key, 202)


@router.get("/v1/images/{image_id}/content")
async def content(image_id: str, request: Request, index: int = Query(0, ge=0, le=255)) -> Response:
    """A picture of a job, once it is completed."""
    return await job_file(request, IMAGE, image_id, index)


add_job_routes(router, IMAGE)


async def _events(ticket: Ticket, body: ImageRequest) -> AsyncIterator[bytes]:
    """An error after the first byte is an event of its own, as OpenAI's clients expect."""
    index = 0
    async with ticket:
        try:
            steps = aiter(ticket)
            while True:
                try:
                    step = await _next(steps)
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                if step is None:
                    break
                if step.preview is None:
                    yield f": step {step.index + 1} of {step.total}\n\n".encode()
                    continue
                picture = await asyncio.to_thread(_picture, step.preview[0], body, {})
                height, width = step.preview.shape[1:3]
                yield _event(
                    "image_generation.partial_image",
                    b64_json=picture,
                    partial_image_index=index,
                    **_described(body, f"{width}x{height}"),
                )
                index += 1
            result = await ticket.result()
        except Exception as error:
            yield _event("error", **described(error)[1])
            return
        picture = await asyncio.to_thread(_picture, result.images[0], body, result.metadata(0))
        size = f"{result.settings.width}x{result.settings.height}"
        yield _event(
            "image_generation.completed",
            b64_json=picture,
            usage=NO_USAGE,
            **_described(body, size),
            gentron=_own(result),
        )


async def _next(steps: AsyncIterator[Any]) -> Any:
    """The next one, or None at the end; raises TimeoutError, and nothing is lost."""
    return await anext(steps, None)


def _event(kind: str, **content: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n".encode()


def _described(body: ImageRequest, size: str) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format or "png",
    }


def _shared(body: ImageRequest, result: Result) -> dict[str, Any]:
    size = f"{result.settings.width}x{result.settings.height}"
    described = _described(body, size)
    names = ("size", "background", "output_format")
    return {name: described[name] for name in names} | {"usage": NO_USAGE, "gentron": _own(result)}


def _own(result: Result) -> dict[str, Any]:
    """What OpenAI's answer has no words for."""
    return {
        "seeds": list(result.seeds),
        "settings": {k: v for k, v in vars(result.settings).items() if k not in ("seed", "batch")},
        "bundle": result.bundle,
        "weights": result.weights,
        "warnings": list(result.warnings),
        "seconds": {stage.stage: stage.seconds for stage in result.stages},
    }


def _encoded(result: Result, body: ImageRequest) -> list[dict[str, str]]:
    return [
        {"b64_json": _picture(picture, body, result.metadata(row))}
        for row, picture in enumerate(result.images)
    ]


def _picture(picture: Picture, body: ImageRequest, metadata: dict[str, Any]) -> str:
    """Base64 of a file in the format asked for; PNG carries the settings."""
    return base64.b64encode(picture_bytes(picture, _output(body), metadata)).decode()


def _output(body: ImageRequest) -> dict[str, Any]:
    return {"format": body.output_format or "png", "compression": body.output_compression}
