"""What the HTTP interface takes: OpenAI's fields, and one of ours, `gentron`.

Nothing is dropped silently: an unknown field, or a value that this server cannot honour, is an
error that names it.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from gentron.errors import RequestError

MAX_PARTIAL_IMAGES = 3  # as OpenAI's
MAX_PREVIEWS = 64
DEFAULT_FPS = 8.0
Number = StrictInt | float


class Extension(BaseModel):
    """What OpenAI's interface has no words for. With its Python client:
    `extra_body={"gentron": {"seed": 7, "steps": 20}}`."""

    model_config = ConfigDict(extra="forbid")

    seed: StrictInt | None = Field(None, description="0 to 2**64 - 1; image k has seed + k")
    steps: StrictInt | None = Field(None, description="denoising steps")
    solver: StrictStr | None = Field(
        None, description="ddim, ddpm, dpm++2m, unipc, lcm, dmd, euler, euler-churn"
    )
    eta: float | None = Field(None, description="ddim's share of fresh noise, 0 to 1")
    guidance: float | None = Field(None, description="lambda_T of equation 6; 1 is off")
    motion: float | None = Field(None, description="lambda_M of equation 6, for videos")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="noise levels; outside of them no step is guided"
    )
    negative: StrictStr | None = Field(None, description="what to steer away from")
    priority: StrictInt | None = Field(None, description="-2 to 2; each has twice the share")
    deadline: float | None = Field(None, gt=0, le=86400, description="seconds from now")

    def settings(self) -> dict[str, Any]:
        """Those that were given, as `Service.submit` takes them."""
        return self.model_dump(exclude_none=True, include=set(Extension.model_fields))


class ImageExtension(Extension):
    previews: StrictInt | None = Field(
        None, ge=0, le=MAX_PREVIEWS, description="partial images, where 3 are too few"
    )
    job: StrictBool | None = Field(
        None, description="answer at once with a job, to be asked about and fetched"
    )


class VideoExtension(Extension):
    frames: StrictInt | None = Field(None, description="instead of `seconds`")
    fps: float | None = Field(None, gt=0, le=240, description="frames a second of the file")


class ImageRequest(BaseModel):
    """`POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr
    model: StrictStr | None = None
    n: StrictInt | None = Field(None, ge=1)
    size: StrictStr | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto")
    stream: StrictBool | None = Field(None, description="server-sent events; with n = 1")
    partial_images: StrictInt | None = Field(None, ge=0, le=MAX_PARTIAL_IMAGES)
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: StrictInt | None = Field(None, ge=0, le=100)
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="the operator's filter")
    user: StrictStr | None = Field(None, max_length=256, description="kept nowhere")
    gentron: ImageExtension | None = None


class VideoRequest(BaseModel):
    """`POST /v1/videos`, as JSON or as a form."""

    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr
    model: StrictStr | None = None
    seconds: StrictStr | StrictInt | None = None
    size: StrictStr | None = None
    gentron: VideoExtension | None = None


def pixels(size: str | None) -> tuple[int, int] | None:
    """`128x96` -> (width, height); None for what is left to the model. Raises RequestError."""
    if size is None or size == "auto":
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if found is None:
        raise RequestError("size", f"must be WIDTHxHEIGHT in pixels or auto, got {size[:40]!r}")
    return int(found[1]), int(found[2])


def frame_count(request: VideoRequest, most: int) -> int:
    """From `frames`, else from `seconds`, else as many as the model was trained on (`most`)."""
    own = request.gentron
    if own is not None and own.frames is not None:
        if request.seconds is not None:
            raise RequestError("frames", "give either `seconds` or `gentron.frames`")
        return own.frames
    if request.seconds is None:
        return most
    try:
        seconds = float(request.seconds)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise RequestError("seconds", f"must be a number of seconds, got {request.seconds!r}")
    return max(1, round(seconds * frame_rate(request)))


def frame_rate(request: VideoRequest) -> float:
    own = request.gentron
    return DEFAULT_FPS if own is None or own.fps is None else own.fps


def preview_steps(count: int, steps: int) -> list[int]:
    """After which steps (0-based) `count` partial images are made: evenly between begin and end."""
    return sorted({(k * steps) // (count + 1) for k in range(1, count + 1)} - {steps - 1})
