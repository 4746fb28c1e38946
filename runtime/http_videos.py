"""`/v1/videos`: a job is made, asked about, fetched, deleted (`http_jobs.py`)."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from fastapi import APIRouter, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from gentron.errors import RequestError
from gentron.runtime.http_jobs import KEY, Asked, add_job_routes, job_file, start_job
from gentron.runtime.http_models import VideoRequest, frame_count, frame_rate, pixels
from gentron.runtime.http_state import ServerState
from gentron.runtime.jobs import VIDEO
from gentron.runtime.video_file import check_fps, check_video_target

router = APIRouter()
RUNTIME_FIELDS = ("priority", "deadline", "frames", "fps")
DESCRIPTION = {  # read by hand below, because it may come as a form
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"$ref": "#/components/schemas/VideoRequest"}}
            for kind in ("application/json", "multipart/form-data")
        },
    }
}


@router.post("/v1/videos", openapi_extra=DESCRIPTION)
async def create(request: Request, key: str | None = Header(None, alias=KEY)) -> Response:
    """Starts a video; ask `GET /v1/videos/{id}` how far it is. The same `Idempotency-Key` and body
    again are answered with the same job."""
    state, wanted = ServerState.of(request), await _read(request)
    state.check_model(wanted.model)
    pipeline = state.service.pipeline
    own = wanted.gentron
    options = own.settings() if own else {}
    options = {name: value for name, value in options.items() if name not in RUNTIME_FIELDS}
    settings = pipeline.settings(
        wanted.prompt,
        size=pixels(wanted.size),
        frames=frame_count(wanted, pipeline.bundle.config.sample_frames),
        **options,
    )
    output = {"format": "mp4", "fps": check_fps(frame_rate(wanted))}
    check_video_target(None, 1, (settings.width, settings.height), "mp4")
    return await start_job(request, Asked(VIDEO, wanted, settings, output, own), key, 200)


@router.get("/v1/videos/{video_id}/content")
async def content(
    video_id: str,
    request: Request,
    variant: Literal["video"] = "video",  # noqa: ARG001  as OpenAI names the file, of three
) -> Response:
    """The file, an MP4, once the job is completed."""
    return await job_file(request, VIDEO, video_id)


add_job_routes(router, VIDEO)


async def _read(request: Request) -> VideoRequest:
    """JSON, or the form that OpenAI's client sends. Raises as FastAPI does for what is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=64) as form:
            values = _from_form(list(form.multi_items()))
    else:
        try:
            values = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise RequestError("body", "is not JSON") from error
    try:
        return VideoRequest.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _from_form(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """`gentron[steps]` is a field of `gentron`, as OpenAI's client writes objects."""
    values: dict[str, Any] = {}
    for name, value in items:
        if isinstance(value, UploadFile):
            raise RequestError(name[:40], "no files are taken; describe the video in the prompt")
        inner = re.fullmatch(r"gentron\[(\w{1,40})\]", name)
        if inner:
            values.setdefault("gentron", {})[inner[1]] = _number(value)
        elif name == "gentron":
            try:
                values["gentron"] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RequestError("gentron", "is not JSON") from error
        else:
            values[name] = value
    return values


def _number(text: str) -> Any:
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{1,20}\.[0-9]{1,20}", text) else text
