"""What videos and asynchronous images have in common: a job is made, asked about, deleted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gentron.errors import RequestError
from gentron.runtime.http_errors import body as error_body
from gentron.runtime.http_models import Extension
from gentron.runtime.http_ranges import file_response
from gentron.runtime.http_state import ServerState, client_of
from gentron.runtime.job_store import JobStore
from gentron.runtime.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    VIDEO,
    Job,
    Key,
    check_job_id,
    check_key,
    new_job_id,
)
from gentron.runtime.request import Request as Checked
from gentron.runtime.result import Settings

KEY = "Idempotency-Key"


@dataclass(frozen=True)
class Asked:
    """A request for a job: its body, what that comes to, and the files that are wanted."""

    kind: str
    body: BaseModel
    settings: Settings
    output: dict[str, Any]
    own: Extension | None


async def start_job(request: Request, asked: Asked, text: str | None, status: int) -> Response:
    """Answers with it; `text` is its idempotency key. Raises what `JobRunner.start` does, and
    RequestError for what cannot be done."""
    state, now, own = ServerState.of(request), time.time(), asked.own
    bundle = state.service.pipeline.bundle
    Checked.of(bundle, asked.settings)
    job = Job(
        id=new_job_id(asked.kind),
        kind=asked.kind,
        client=client_of(request),
        settings=vars(asked.settings),
        output=asked.output,
        model=state.model,
        digest=bundle.digest,
        created=now,
        priority=(own.priority if own else None) or 0,
        deadline=now + own.deadline if own and own.deadline else None,
    )
    key = None if text is None else Key(check_key(text), fingerprint(asked.body))
    stored = await state.runner.start(job, key)
    state.note(stored.id, asked.settings.prompt, asked.settings.negative)
    headers = {} if stored.id == job.id else {"Idempotent-Replayed": "true"}
    return JSONResponse(described_job(stored, state.runner.store), status, headers)


def fingerprint(body: BaseModel) -> str:
    """The same for the same request, however its JSON or form was written."""
    values = json.dumps(body.model_dump(exclude_none=True), sort_keys=True)
    return hashlib.sha256(values.encode("utf-8", "surrogatepass")).hexdigest()


def described_job(job: Job, store: JobStore) -> dict[str, Any]:
    settings, output = job.settings, job.output
    described = {
        "id": job.id,
        "object": job.kind,
        "model": job.model,
        "status": FAILED if job.status == CANCELLED else job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": None,
        "expires_at": None,
        "error": None,
        "prompt": settings["prompt"],
        "size": f"{settings['width']}x{settings['height']}",
    }
    own = {"seed": settings["seed"], "steps": job.steps, "done_steps": job.done_steps}
    if job.completed is not None:
        described["completed_at"] = int(job.completed)
        described["expires_at"] = int(job.completed + store.keep.seconds)
    if job.error is not None:
        described["error"] = {"code": job.error[0], "message": job.error[1]}
    if job.kind == VIDEO:
        described["remixed_from_video_id"] = None
        described["seconds"] = f"{settings['frames'] / output['fps']:g}"
        own |= {"frames": settings["frames"], "fps": output["fps"]}
    else:
        described |= {"n": settings["batch"], "output_format": output["format"]}
    return described | {"gentron": own}


def add_job_routes(router: APIRouter, kind: str) -> None:
    """`/v1/{kind}s`: list, cancel by key; `/v1/{kind}s/{id}`: look, delete."""
    root = f"/v1/{kind}s"
    one = f"{root}/{{{kind}_id}}"

    @router.get(root, name=f"list_{kind}s")
    async def listing(
        request: Request,
        limit: int = Query(20, ge=1, le=100),
        after: str | None = Query(None, max_length=64),
        order: str = Query("desc", pattern="^(asc|desc)$"),
    ) -> dict[str, Any]:
        """The client's own jobs, newest first."""
        store = ServerState.of(request).runner.store
        found = await asyncio.to_thread(
            store.page, client_of(request), kind, limit + 1, after, order == "desc"
        )
        page = found[:limit]
        return {
            "object": "list",
            "data": [described_job(job, store) for job in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(found) > limit,
        }

    @router.delete(root, name=f"cancel_{kind}")
    async def cancel(request: Request, key: str = Header(alias=KEY)) -> Response:
        """Cancels and forgets the job that was made with this key. If there is none yet, the
        request that brings the key is answered with a cancelled job when it arrives."""
        runner = ServerState.of(request).runner
        job = await asyncio.to_thread(
            runner.store.cancel_key, client_of(request), kind, check_key(key)
        )
        if job is not None:
            runner.cancel(job.id)
        return _deleted(kind, None if job is None else job.id)

    @router.get(one, name=f"look_at_{kind}")
    async def look(request: Request, id: str = Path(alias=f"{kind}_id")) -> Response:
        """Status, and progress in percent."""
        job = await job_of(request, kind, id)
        store = ServerState.of(request).runner.store
        return missing(kind) if job is None else JSONResponse(described_job(job, store))

    @router.delete(one, name=f"delete_{kind}")
    async def delete(request: Request, id: str = Path(alias=f"{kind}_id")) -> Response:
        """Cancels it if it runs, and forgets it."""
        runner, checked = ServerState.of(request).runner, check_job_id(kind, id)
        job = await asyncio.to_thread(runner.store.delete, checked, client_of(request))
        if job is None:
            return missing(kind)
        runner.cancel(job.id)
        return _deleted(kind, job.id)


async def job_of(request: Request, kind: str, id: str) -> Job | None:
    store = ServerState.of(request).runner.store
    return await asyncio.to_thread(store.get, check_job_id(kind, id), client_of(request))


async def job_file(request: Request, kind: str, id: str, index: int = 0) -> Response:
    """The file of a completed job, or why there is none."""
    job = await job_of(request, kind, id)
    if job is None:
        return missing(kind)
    if job.status != COMPLETED:
        message = f"{kind}_id: this {kind} is {job.status}; its file is there once it is completed"
        return JSONResponse(error_body(message, 409, "not_completed", f"{kind}_id"), 409)
    if index >= job.settings["batch"]:
        raise RequestError("index", f"this job has {job.settings['batch']} files, 0 is the first")
    file = await asyncio.to_thread(ServerState.of(request).runner.store.open, job.id, index)
    if file is None:
        return missing(kind)
    return file_response(request, file, job.media_type, f"{job.id}-{index}")


def missing(kind: str) -> Response:
    message = f"{kind}_id: there is no such {kind}, or it is not kept any more"
    return JSONResponse(error_body(message, 404, "not_found", f"{kind}_id"), 404)


def _deleted(kind: str, id: str | None) -> Response:
    return JSONResponse({"id": id, "object": f"{kind}.deleted", "deleted": True})
