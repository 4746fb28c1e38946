"""The page at `/`, and what it has to know of the server: `GET /v1/models` says it to anybody.

Its files are in `runtime/page/`, as they are sent: nothing builds them, and nothing comes from
elsewhere. They hold nothing of anybody's work, so they are given without a key.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from gentron.runtime.http_models import DEFAULT_FPS, MAX_PREVIEWS
from gentron.runtime.service import Service
from gentron.runtime.video_file import MAX_FPS
from gentron.solvers import solvers_for

router = APIRouter(include_in_schema=False)
FILES = {  # every file that is given, and nothing else
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "form.js": "text/javascript",
    "gallery.js": "text/javascript",
    "stage.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# Pictures and films are shown from the browser's memory, hence blob:.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    return _file("index.html", "text/html")


@router.get("/static/{name}")
async def static(name: str) -> Response:
    if name not in FILES:
        return Response(status_code=404, headers=HEADERS)
    return _file(name, FILES[name])


@router.get("/favicon.ico")
async def icon() -> Response:
    return _file("icon.svg", FILES["icon.svg"])


def _file(name: str, kind: str) -> Response:
    content = files("gentron.runtime").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers=HEADERS)


def abilities(service: Service) -> dict[str, Any]:
    """What the served bundle can do, its defaults, and how much this server takes on: enough for
    a form. Sizes are (width, height) in pixels."""
    bundle, bounds = service.pipeline.bundle, service.options.bounds
    config, defaults = bundle.config, bundle.manifest.defaults
    unit = config.patch * bundle.vae_factor
    least, most = config.side_range
    return {
        "weights": bundle.manifest.weights,
        "size": list(bundle.native_size),
        "side": {"least": -(-least // unit) * unit, "most": most // unit * unit, "unit": unit},
        "solvers": solvers_for(bundle.schedule),
        "defaults": dict(vars(defaults)),
        "limits": {
            "n": min(bounds.batch, service.scheduler.limits.samples),
            "steps": bounds.steps,
            "prompt_bytes": bounds.prompt_bytes,
            "previews": min(bounds.previews, MAX_PREVIEWS),
        },
        "video": {
            "frames": config.sample_frames,
            "most_frames": config.max_frames,
            "fps": DEFAULT_FPS,
            "most_fps": MAX_FPS,
        }
        if config.temporal
        else None,
        "words": _words(bundle.path / "nouns.txt"),
    }  # fmt: skip


def _words(file: Path) -> list[str]:
    """What the model was shown, where its bundle tells."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][:2000]
