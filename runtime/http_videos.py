"""`/v1/videos`: a job is made, asked about, fetched, deleted."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from gentron.errors import RequestError
from gentron.runtime.http_errors import body as error_body
from gentron.runtime.http_models import VideoRequest, frame_count, frame_rate, pixels
from gentron.runtime.http_state import ServerState, client_of
from gentron.runtime.jobs import CANCELLED, COMPLETED, FAILED, Job, check_job_id, new_job_id
from gentron.runtime.request import Request as Checked
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
async def create(request: Request) -> dict[str, Any]:
    """Starts a video; ask `GET /v1/videos/{id}` how far it is."""
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
    Checked.of(pipeline.bundle, settings)
    fps = check_fps(frame_rate(wanted))
    check_video_target(None, 1, (settings.width, settings.height), "mp4")
    now = time.time()
    job = Job(
        id=new_job_id(),
        client=client_of(request),
        settings=vars(settings),
        fps=fps,
        created=now,
        steps=settings.steps,
        priority=(own.priority if own else None) or 0,
        deadline=now + own.deadline if own and own.deadline else None,
    )
    state.runner.start(job)
    state.note(job.id, settings.prompt, settings.negative)
    return _described(job, state.model)


@router.get("/v1/videos")
async def listing(
    request: Request,
    limit: int = Query(20, ge=1, le=100),
    after: str | None = Query(None, max_length=64),
    order: str = Query("desc", pattern="^(asc|desc)$"),
) -> dict[str, Any]:
    """The client's own, newest first."""
    state = ServerState.of(request)
    jobs = state.runner.store.of_client(client_of(request))
    jobs = jobs if order == "desc" else jobs[::-1]
    if after is not None:
        ids = [job.id for job in jobs]
        jobs = jobs[ids.index(after) + 1 :] if after in ids else []
    page = jobs[:limit]
    return {
        "object": "list",
        "data": [_described(job, state.model) for job in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(jobs) > limit,
    }


@router.get("/v1/videos/{video_id}")
async def look(video_id: str, request: Request) -> Response:
    """Status, and progress in percent."""
    state, job = ServerState.of(request), _job(request, video_id)
    return _missing() if job is None else JSONResponse(_described(job, state.model))


@router.get("/v1/videos/{video_id}/content")
async def content(
    video_id: str,
    request: Request,
    variant: Literal["video"] = "video",  # noqa: ARG001  as OpenAI names the file, of three
) -> Response:
    """The file, an MP4, once the job is completed."""
    job = _job(request, video_id)
    if job is None:
        return _missing()
    data = ServerState.of(request).runner.store.content(job.id)
    if job.status != COMPLETED or data is None:
        message = f"video_id: this video is {job.status}; its file is there once it is completed"
        return JSONResponse(error_body(message, 409, "not_completed", "video_id"), 409)
    return Response(data, media_type="video/mp4")


@router.delete("/v1/videos/{video_id}")
async def delete(video_id: str, request: Request) -> Response:
    """Cancels it if it runs, and forgets it."""
    state = ServerState.of(request)
    job = state.runner.store.delete(check_job_id(video_id), client_of(request))
    if job is None:
        return _missing()
    state.runner.cancel(job.id)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


def _job(request: Request, video_id: str) -> Job | None:
    store = ServerState.of(request).runner.store
    return store.get(check_job_id(video_id), client_of(request))


def _missing() -> Response:
    message = "video_id: there is no such video, or it is not kept any more"
    return JSONResponse(error_body(message, 404, "not_found", "video_id"), 404)


def _described(job: Job, model: str) -> dict[str, Any]:
    settings = job.settings
    described = {
        "id": job.id,
        "object": "video",
        "model": model,
        "status": FAILED if job.status == CANCELLED else job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": None if job.completed is None else int(job.completed),
        "expires_at": None,
        "error": None,
        "prompt": settings["prompt"],
        "remixed_from_video_id": None,
        "seconds": f"{settings['frames'] / job.fps:g}",
        "size": f"{settings['width']}x{settings['height']}",
        "gentron": {
            "seed": settings["seed"],
            "steps": job.steps,
            "done_steps": job.done_steps,
            "frames": settings["frames"],
            "fps": job.fps,
        },
    }
    if job.error is not None:
        described["error"] = {"code": job.error[0], "message": job.error[1]}
    return described


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
