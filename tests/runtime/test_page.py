"""What the server says and sends for the page at `/`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gentron.runtime.http_api import create_app
from gentron.runtime.http_page import FILES
from gentron.runtime.metrics import Metrics
from gentron.runtime.service import Service

FOLDER = Path(__file__).resolve().parents[2] / "runtime" / "page"


@pytest.fixture(scope="module")
def client(video_pipeline) -> Iterator[TestClient]:
    app = create_app(lambda: Service(video_pipeline), Metrics(), [(16, 16)])
    with TestClient(app, base_url="http://127.0.0.1") as asked:
        yield asked


def test_every_file_of_the_page_is_sent_and_no_other(client):
    assert {file.name for file in FOLDER.iterdir()} == {"index.html", *FILES}
    for name, kind in {"": "text/html", **{f"static/{n}": k for n, k in FILES.items()}}.items():
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.content == (FOLDER / (Path(name).name or "index.html")).read_bytes()
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("index.html", "..%2fhttp_page.py", "%2e%2e/http_page.py", "x"):
        assert client.get(f"/static/{name}").status_code == 404


def test_the_page_needs_nothing_from_outside_and_nothing_inline():
    html = (FOLDER / "index.html").read_text()
    assert not re.findall(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", html)
    for file in FOLDER.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r"https?:|['\"(]//|@import", text), file.name
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
        )


def test_a_client_is_told_what_the_bundle_can_do(client, video_pipeline):
    (model,) = client.get("/v1/models").json()["data"]
    told, config = model["gentron"], video_pipeline.bundle.config
    assert told["weights"] == "random"
    assert told["defaults"] == vars(video_pipeline.bundle.manifest.defaults)
    assert told["video"] == {
        "frames": config.sample_frames, "most_frames": config.max_frames, "fps": 8.0,
        "most_fps": 240,
    }  # fmt: skip
    side, most = told["side"], told["limits"]
    for solver in told["solvers"]:
        body = {"prompt": "x", "size": f"{side['least']}x{side['least']}", "n": 1,
                "gentron": {"solver": solver, "steps": 1 if solver == "dmd" else 2}}  # fmt: skip
        assert client.post("/v1/images/generations", json=body).status_code == 200, solver
    for field, value in (("n", most["n"] + 1), ("size", f"{side['least'] + 1}x{side['least']}")):
        body = {"prompt": "x", "gentron": {"steps": 1}, field: value}
        assert client.post("/v1/images/generations", json=body).status_code == 400
    body = {"prompt": "x", "gentron": {"steps": most["steps"] + 1}}
    assert client.post("/v1/images/generations", json=body).status_code == 400


def test_a_bundle_of_pictures_says_that_it_has_no_video(tiny_pipeline):
    app = create_app(lambda: Service(tiny_pipeline), Metrics(), [(16, 16)])
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models/tiny").json()["gentron"]["video"] is None


def test_a_stream_may_have_more_partial_images_than_openais(client):
    body = {
        "prompt": "x",
        "size": "16x16",
        "stream": True,
        "gentron": {"steps": 150, "previews": 6},
    }
    answer = client.post("/v1/images/generations", json=body).text
    assert 3 < answer.count("event: image_generation.partial_image") <= 6
    steps = [int(step) for step in re.findall(r"^: step (\d+) of 150$", answer, re.MULTILINE)]
    assert steps == sorted(set(steps))
    assert steps
    wrong = (
        body | {"partial_images": 2},
        body | {"stream": False},
        body | {"gentron": {"previews": 65}},
        body | {"gentron": {"previews": 9, "steps": 20}},
    )
    assert [client.post("/v1/images/generations", json=b).status_code for b in wrong] == [400] * 4
