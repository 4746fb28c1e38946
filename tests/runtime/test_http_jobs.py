"""Jobs as clients meet them: pictures as jobs, keys, a restart, a full disk, a bundle that goes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from gentron.runtime import Pipeline
from gentron.runtime.admission import Bounds
from gentron.runtime.http_api import create_app
from gentron.runtime.job_store import JobStore
from gentron.runtime.metrics import Metrics
from gentron.runtime.service import Options, Service

OWN = {"seed": 7, "steps": 4, "solver": "ddim", "guidance": 4.0}
IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"
JOB = {"prompt": "a cat", "size": "16x24", "n": 2, "gentron": {**OWN, "job": True}}
LONG = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": 500, "frames": 3}}


def app_of(pipeline: Pipeline, folder: Path | None) -> FastAPI:
    metrics = Metrics()
    options = Options(bounds=Bounds(requests=6, steps=2000), observer=metrics)
    return create_app(lambda: Service(pipeline, options), metrics, [(16, 16)], JobStore(folder))


@contextmanager
def serving(pipeline: Pipeline, folder: Path | None) -> Iterator[TestClient]:
    """The application on its own event loop; left in order."""
    with TestClient(app_of(pipeline, folder), base_url="http://127.0.0.1") as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(client: TestClient, path: str) -> dict[str, Any]:
    until(lambda: client.get(path).json()["status"] not in ("queued", "in_progress"))
    return dict(client.get(path).json())


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


@pytest.fixture(scope="module")
def client(video_pipeline: Pipeline, tmp_path_factory) -> Iterator[TestClient]:
    with serving(video_pipeline, tmp_path_factory.mktemp("jobs")) as running:
        yield running


def test_pictures_as_a_job_are_those_that_the_pipeline_draws(client, video_pipeline):
    made = client.post(IMAGES, json=JOB)
    assert made.status_code == 202
    job = made.json()
    assert (job["object"], job["status"], job["n"], job["size"]) == ("image", "queued", 2, "16x24")
    path = f"/v1/images/{job['id']}"
    done = ended(client, path)
    assert (done["status"], done["progress"], done["gentron"]["done_steps"]) == (
        "completed",
        100,
        4,
    )
    assert done["expires_at"] - done["completed_at"] == 24 * 3600
    wanted = video_pipeline("a cat", batch=2, size=(16, 24), **OWN)
    for index in range(2):
        answer = client.get(f"{path}/content", params={"index": index})
        assert answer.headers["content-type"] == "image/png"
        file = Image.open(io.BytesIO(answer.content))
        assert np.abs(np.asarray(file).astype(int) - wanted.images[index]).max() <= 1
        assert json.loads(file.text["gentron"])["row_seed"] == 7 + index
    whole = client.get(f"{path}/content")
    size, tag = len(whole.content), whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"

    def part(asked, **headers):
        return client.get(f"{path}/content", headers={"range": asked, **headers})

    middle = part("bytes=5-99", **{"if-range": tag})
    assert (middle.status_code, middle.content) == (206, whole.content[5:100])
    assert middle.headers["content-range"] == f"bytes 5-99/{size}"
    assert part("bytes=-7").content == whole.content[-7:]
    assert part("bytes=5-", **{"if-range": '"another"'}).content == whole.content
    behind = part(f"bytes={size}-")
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{size}")
    assert f"the file has {size} bytes" in behind.json()["error"]["message"]
    assert client.get(f"{path}/content", params={"index": 2}).json()["error"]["param"] == "index"
    assert client.get("/v1/images").json()["data"][0]["id"] == job["id"]
    assert client.get(f"/v1/videos/{job['id']}").status_code == 400
    assert client.delete(path).json() == {
        "id": job["id"], "object": "image.deleted", "deleted": True
    }  # fmt: skip
    assert client.get(path).json()["error"]["code"] == "not_found"
    assert client.get(f"{path}/content").status_code == 404


@pytest.mark.parametrize(
    ("body", "head", "param"),
    [
        ({**JOB, "stream": True, "n": 1}, {}, "stream"),
        ({**JOB, "gentron": {**OWN, "job": 1}}, {}, "gentron.job"),
        ({**JOB, "n": 5}, {}, "n"),
        ({"prompt": "a cat"}, keyed("k"), "Idempotency-Key"),
        (JOB, keyed("k" * 256), "Idempotency-Key"),
        (JOB, keyed("a b"), "Idempotency-Key"),
    ],
)
def test_a_mistake_is_named(client, body, head, param):
    answer = client.post(IMAGES, json=body, headers=head)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_same_key_and_body_are_the_same_job(client):
    body = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": 2, "frames": 1}}
    first = client.post(VIDEOS, json=body, headers=keyed("same"))
    form = {"size": "16x16", "prompt": "a cat", "gentron": '{"frames": 1, "steps": 2}'}
    for again in (
        client.post(VIDEOS, json=body, headers=keyed("same")),
        client.post(VIDEOS, files={k: (None, v) for k, v in form.items()}, headers=keyed("same")),
    ):
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        assert again.headers["idempotent-replayed"] == "true"
    other = client.post(VIDEOS, json={**body, "prompt": "a dog"}, headers=keyed("same"))
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    new = client.post(VIDEOS, json=body, headers=keyed("new"))
    assert new.json()["id"] != first.json()["id"]
    assert "idempotent-replayed" not in new.headers


def test_a_key_finds_its_job_when_nothing_more_is_taken_on(client):
    made = [client.post(VIDEOS, json=LONG, headers=keyed(f"full-{n}")) for n in range(7)]
    assert [answer.status_code for answer in made] == [200] * 6 + [429]
    again = client.post(VIDEOS, json=LONG, headers=keyed("full-0"))
    assert again.json()["id"] == made[0].json()["id"]
    for n in range(6):
        assert client.delete(VIDEOS, headers=keyed(f"full-{n}")).json()["deleted"]
    until(lambda: "gentron_requests_running 0.0" in client.get("/metrics").text)


@pytest.mark.parametrize(("path", "body"), [(VIDEOS, LONG), (IMAGES, JOB)])
def test_a_cancellation_that_comes_first_is_found_by_the_request(client, path, body):
    early = client.delete(path.removesuffix("/generations"), headers=keyed("early"))
    assert early.json()["id"] is None
    late = client.post(path, json=body, headers=keyed("early"))
    assert late.status_code in (200, 202)
    assert (late.json()["status"], late.json()["error"]["code"]) == ("failed", "cancelled")
    assert client.post(path, json=body, headers=keyed("early")).json()["id"] == late.json()["id"]
    assert "gentron_requests_running 0.0" in client.get("/metrics").text
    assert client.delete(path.removesuffix("/generations")).status_code == 400


def test_a_restart_goes_on_with_jobs_and_keeps_results(video_pipeline, tmp_path):
    with serving(video_pipeline, tmp_path) as client:
        done = client.post(IMAGES, json=JOB, headers=keyed("done")).json()["id"]
        assert ended(client, f"/v1/images/{done}")["status"] == "completed"
        picture = client.get(f"/v1/images/{done}/content").content
        body = {**LONG, "gentron": {**LONG["gentron"], "seed": 5}}
        left = client.post(VIDEOS, json=body, headers=keyed("left")).json()["id"]
        until(lambda: client.get(f"/v1/videos/{left}").json()["status"] == "in_progress")
    with serving(video_pipeline, tmp_path) as client:
        again = client.post(VIDEOS, json=body, headers=keyed("left")).json()
        assert (again["id"], again["gentron"]["seed"]) == (left, 5)
        assert client.get(f"/v1/images/{done}/content").content == picture
        assert ended(client, f"/v1/videos/{left}")["status"] == "completed"
        assert client.get(f"/v1/videos/{left}/content").content[4:8] == b"ftyp"


def test_a_job_for_another_bundle_is_not_gone_on_with(video_pipeline, tmp_path, monkeypatch):
    with serving(video_pipeline, tmp_path) as client:
        left = client.post(VIDEOS, json=LONG).json()["id"]
    other = replace(video_pipeline.bundle, digest="another")
    monkeypatch.setattr(video_pipeline, "bundle", other)
    with serving(video_pipeline, tmp_path) as client:
        found = ended(client, f"/v1/videos/{left}")
        assert found["error"] == {
            "code": "bundle_changed",
            "message": "this server has another bundle by now; ask again",
        }


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """4 MB of memory as a file system, where that may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_jobs_and_nothing_else(video_pipeline, small_disk):
    with serving(video_pipeline, small_disk / "jobs") as client:
        running = client.post(VIDEOS, json=LONG).json()["id"]
        with pytest.raises(OSError, match="No space"):
            (small_disk / "ballast").write_bytes(b"x" * (1 << 23))
        refused = client.post(IMAGES, json=JOB)
        while refused.status_code == 202:  # the log of the database may have some room left
            failed = ended(client, f"/v1/images/{refused.json()['id']}")
            assert failed["error"]["code"] == "storage"
            assert "free some space" in failed["error"]["message"]
            refused = client.post(IMAGES, json=JOB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        assert "the disk is full; free some space" in refused.json()["error"]["message"]
        waiting = {**JOB, "gentron": OWN}
        assert client.post(IMAGES, json=waiting).status_code == 200
        assert client.get("/healthz").status_code == 200
        (small_disk / "ballast").unlink()
        made = client.post(IMAGES, json=JOB).json()["id"]
        assert ended(client, f"/v1/images/{made}")["status"] == "completed"
        client.delete(f"/v1/videos/{running}")


def test_a_bundle_that_is_deleted_while_it_is_served(tiny_video_bundle, tmp_path):
    """Where components come and go under a memory limit: a request that needs a file says so, and
    the server goes on when the bundle is back."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_video_bundle, folder)
    with (
        Pipeline.load(folder, memory=1_650_000) as pipeline,
        serving(pipeline, tmp_path / "jobs") as client,
    ):
        shutil.move(folder, tmp_path / "away")
        failed = client.post(IMAGES, json={"prompt": "a dog", "gentron": OWN})
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "bundle")
        assert str(folder) in failed.json()["error"]["message"]
        job = client.post(IMAGES, json={**JOB, "prompt": "a dog"}).json()["id"]
        assert ended(client, f"/v1/images/{job}")["error"]["code"] == "bundle"
        assert client.get("/healthz").status_code == 200
        shutil.move(tmp_path / "away", folder)
        again = client.post(IMAGES, json={"prompt": "a dog", "gentron": OWN})
        assert again.status_code == 200, again.text
