"""The server as its clients see it, over real connections on this machine."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from gentron.runtime.admission import Bounds
from gentron.runtime.service import Filters, Options

STEPS = {"gentron": {"seed": 7, "steps": 4, "solver": "ddim", "guidance": 4.0}}


@pytest.fixture(scope="module")
def server(video_pipeline, listening):
    options = Options(
        bounds=Bounds(requests=16, steps=2000, batch=4),
        filters=Filters(prompt=lambda text: "no rats here" if "rat" in text else None),
    )
    with listening(video_pipeline, options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server, body: Any, path: str = "/v1/images/generations") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def picture(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_openais_client_gets_the_pictures_that_the_pipeline_draws(client, video_pipeline):
    found = client.images.generate(prompt="a cat", n=2, size="16x24", extra_body=STEPS)
    wanted = video_pipeline(
        "a cat", seed=7, steps=4, solver="ddim", guidance=4.0, batch=2, size=(16, 24)
    )
    assert found.data is not None
    for row, image in enumerate(found.data):
        assert np.abs(picture(image.b64_json).astype(int) - wanted.images[row]).max() <= 1
    file = Image.open(io.BytesIO(base64.b64decode(found.data[1].b64_json)))
    metadata = json.loads(file.text["gentron"])
    assert metadata["row_seed"] == 8
    assert (found.size, found.output_format) == ("16x24", "png")


def test_openais_client_streams_partial_images_and_then_the_picture(client, video_pipeline):
    events = list(
        client.images.generate(
            prompt="a cat", size="16x16", stream=True, partial_images=2, extra_body=STEPS
        )
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image", "image_generation.partial_image",
        "image_generation.completed",
    ]  # fmt: skip
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    shapes = {picture(event.b64_json).shape for event in events}
    assert shapes == {(16, 16, 3)}
    wanted = video_pipeline(
        "a cat", seed=7, steps=4, solver="ddim", guidance=4.0, size=(16, 16)
    ).images[0]
    assert np.abs(picture(events[2].b64_json).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("format_", ["jpeg", "webp"])
def test_other_formats_are_what_they_say(client, format_):
    found = client.images.generate(
        prompt="a cat", size="16x16", output_format=format_, extra_body=STEPS
    )
    file = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json)))
    assert file.format == format_.upper()


def test_a_video_is_a_job_that_openais_client_follows(client, server):
    with pytest.warns(DeprecationWarning, match="Sora"):  # noqa: PT031  of every call
        video = client.videos.create(
            prompt="a red car", size="16x16",
            extra_body={"gentron": {"frames": 3, "steps": 3, "seed": 1, "fps": 4}},
        )  # fmt: skip
        assert (video.status, video.seconds) == ("queued", "0.75")
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve("video_0000")
        server.until(lambda: client.videos.retrieve(video.id).status == "completed")
        assert client.videos.retrieve(video.id).progress == 100
        data = client.videos.download_content(video.id).read()
        assert client.videos.list().data[0].id == video.id
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
    assert data[4:8] == b"ftyp"


def test_a_video_that_is_deleted_stops(server):
    made = post(server, {"prompt": "a cat", "size": "16x16",
                         "gentron": {"frames": 3, "steps": 400}}, "/v1/videos")  # fmt: skip
    assert made.status_code == 200
    url = f"{server.url}/v1/videos/{made.json()['id']}"
    early = httpx.get(f"{url}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_completed")
    assert httpx.delete(url).json()["deleted"] is True
    server.until(lambda: server.metric("gentron_requests_running") == 0, 10)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a cat", "size": "17x16"}, "size"),
        ({"prompt": "a cat", "size": "big"}, "size"),
        ({"prompt": "a cat", "sise": "16x16"}, "sise"),
        ({"prompt": "a cat", "model": "dall-e-3"}, "model"),
        ({"prompt": "a cat", "n": 5}, "n"),
        ({"prompt": "a cat", "n": True}, "n"),
        ({"prompt": 3}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a cat", "response_format": "url"}, "response_format"),
        ({"prompt": "a cat", "stream": True, "n": 2}, "stream"),
        ({"prompt": "a cat", "partial_images": 1}, "partial_images"),
        ({"prompt": "a cat", "gentron": {"steps": 0}}, "steps"),
        ({"prompt": "a cat", "gentron": {"solver": "magic"}}, "solver"),
        ({"prompt": "a cat", "gentron": {"seed": -1}}, "seed"),
        ({"prompt": "a cat", "gentron": {"sampler": "x"}}, "gentron.sampler"),
    ],
)
def test_a_mistake_is_named(server, body, param):
    answer = post(server, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(param)


def test_a_prompt_that_the_operator_refuses(server):
    answer = post(server, {"prompt": "a rat", **STEPS})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_policy_violation"


def test_a_body_that_is_too_large_or_not_json(server):
    url = f"{server.url}/v1/images/generations"
    assert httpx.post(url, content=b"x" * 200_000).status_code == 413
    kind = {"content-type": "application/json"}
    assert httpx.post(url, content=b"{", headers=kind).status_code == 400
    assert httpx.post(url, content=b"[" * 90_000, headers=kind).status_code == 400


def test_closing_the_connection_cancels_a_whole_request_and_a_stream(server):
    for stream in (False, True):
        before = server.metric("gentron_requests_total", outcome="cancelled")
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"prompt": "a cat", "stream": stream, "gentron": {"steps": 400}}
        head = {"content-type": "application/json"}
        connection.request("POST", "/v1/images/generations", json.dumps(body), head)
        if stream:
            assert connection.getresponse().read(10)
        server.until(lambda: server.metric("gentron_requests_running") == 1, 20)
        connection.close()
        server.until(
            lambda n=before: server.metric("gentron_requests_total", outcome="cancelled") > n, 10
        )
        server.until(lambda: server.metric("gentron_requests_running") == 0, 10)


def test_a_client_that_does_not_read_holds_nobody_up(server):
    slow = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"prompt": "a cat", "stream": True, "partial_images": 3, "gentron": {"steps": 300}}
    head = {"content-type": "application/json"}
    slow.request("POST", "/v1/images/generations", json.dumps(body), head)
    assert post(server, {"prompt": "a dog", "size": "16x16", **STEPS}).status_code == 200
    answer = slow.getresponse().read()
    slow.close()
    assert answer.count(b"event: image_generation.partial_image") == 3
    assert answer.count(b"event: image_generation.completed") == 1


def test_a_full_server_says_when_to_come_again(server):
    def ask(answers: list[httpx.Response]) -> None:
        body = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": 100}}
        answers.append(post(server, body))

    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=ask, args=(answers,)) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_health_answers_while_pictures_are_drawn(server):
    thread = threading.Thread(
        target=post, args=(server, {"prompt": "a cat", "n": 4, "gentron": {"steps": 200}})
    )
    thread.start()
    server.until(lambda: server.metric("gentron_requests_running") == 1)
    times = []
    with httpx.Client() as one:
        for _ in range(20):
            started = time.perf_counter()
            assert one.get(f"{server.url}/healthz").json() == {"healthy": True}
            times.append(time.perf_counter() - started)
    thread.join()
    assert sorted(times)[len(times) // 2] < 0.1, times


def test_models_metrics_and_description(server, client):
    assert [model.id for model in client.models.list().data] == ["tiny-video"]
    assert client.models.retrieve("tiny-video").owned_by == "gentron"
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("queue_seconds", "step_rows", "step_seconds", "stage_seconds", "requests_total"):
        assert f"gentron_{name}" in text
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert "VideoRequest" in described["components"]["schemas"]


def test_no_request_made_up_from_the_description_is_a_defect(server):
    """Valid ones and broken ones, for every route: an error is one of ours, and says why."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    tried = 0
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in modes if operation.body or operation.query else modes[:1]:

            @settings(
                max_examples=8, deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal tried
                answer = case.call(timeout=60)
                tried += 1
                if answer.status_code >= 400 and case.path != "/readyz":
                    assert answer.status_code < 500, (case.body, answer.text)
                    assert answer.json()["error"]["message"], (case.body, answer.text)

            ask()
    assert tried > 50
    assert httpx.get(f"{server.url}/healthz").status_code == 200
