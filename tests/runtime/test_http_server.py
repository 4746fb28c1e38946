"""The end of a server, and another bundle in place of the one that is served: nobody is dropped."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from gentron.errors import BundleError
from gentron.runtime import Pipeline
from gentron.runtime.http_api import create_app
from gentron.runtime.http_server import Server
from gentron.runtime.metrics import Metrics
from gentron.runtime.service import Options, Service
from gentron.runtime.step_batch import StepBatch

IMAGES = "/v1/images/generations"


class Running:
    """The server in a thread; `handle_exit` stands for the signals."""

    def __init__(self, open_service, metrics, drain_timeout=30.0):
        self.metrics = metrics
        self.app = create_app(open_service, metrics, [(16, 16)])
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = Server(self.app, "127.0.0.1", 0, drain_timeout)
        self.thread = threading.Thread(target=lambda: self.server.run([self.socket]))

    def __enter__(self) -> Running:
        self.thread.start()
        until(lambda: self.server.started)
        until(lambda: self.get("/readyz").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def ask(self, steps: int, seed: int = 1) -> httpx.Response:
        body = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": steps, "seed": seed}}
        return httpx.post(self.url + IMAGES, json=body, timeout=60)

    def metric(self, name: str, /, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def until(ready, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def server(tiny_pipeline, monkeypatch, request) -> Iterator[Running]:
    """Whose steps take 0.05 s at least, once it is ready."""
    seconds, metrics, step = getattr(request, "param", 30.0), Metrics(), StepBatch.step
    options = Options(observer=metrics)
    with Running(lambda: Service(tiny_pipeline, options), metrics, seconds) as running:
        monkeypatch.setattr(StepBatch, "step", lambda *a: (time.sleep(0.05), step(*a))[1])
        yield running


def under_way(server: Running) -> None:
    until(lambda: server.metric("gentron_requests_running") == 1)


def test_what_runs_ends_and_what_comes_is_sent_elsewhere(server, caplog):
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, 30)
        under_way(server)
        server.server.handle_exit(15, None)
        until(lambda: server.get("/readyz").status_code == 503, 2)
        refused = server.ask(1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/healthz").status_code == 200
        assert server.get("/v1/videos").status_code == 200
        assert server.metric("gentron_draining") == 1
        assert not running.done()
        assert running.result().status_code == 200
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert "ending: 1 requests are under way" in caplog.text


@pytest.mark.parametrize("server", [0.3], indirect=True)
def test_after_the_limit_what_runs_is_cancelled_and_told(server, caplog):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, 200)
        under_way(server)
        server.server.handle_exit(15, None)
        answer = running.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cancelled")
    assert "service is closing" in answer.json()["error"]["message"]
    assert "1 requests did not end in time and are cancelled" in caplog.text
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_a_second_signal_ends_it_at_once(server):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, 200)
        under_way(server)
        started = time.monotonic()
        server.server.handle_exit(15, None)
        until(lambda: server.get("/readyz").status_code == 503, 2)
        server.server.handle_exit(15, None)
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert time.monotonic() - started < 5
        with contextlib.suppress(httpx.TransportError):  # closed before the answer was out
            assert running.result().status_code == 503


def pixels(answer: httpx.Response) -> np.ndarray:
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_another_bundle_takes_over_under_load_and_a_bad_one_changes_nothing(
    tiny_bundle, tiny_video_bundle, caplog
):
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    wanted = [tiny_bundle]

    def open_service() -> Service:
        pipeline = Pipeline.load(wanted[0])
        return Service(pipeline, Options(observer=metrics.of_service()), owns=True)

    expected = {}
    for bundle in (tiny_bundle, tiny_video_bundle):
        with Pipeline.load(bundle) as pipe:
            name = pipe.bundle.manifest.name
            for seed in range(4):
                drawn = pipe("a cat", seed=seed, steps=6, size=(16, 16))
                expected[name, seed] = drawn.images[0].astype(int)
    first, second = dict.fromkeys(name for name, _ in expected)
    assert np.abs(expected[first, 0] - expected[second, 0]).max() > 8
    answers: list[tuple[int, httpx.Response]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            seed = len(answers) % 4
            answers.append((seed, server.ask(6, seed)))

    with Running(open_service, metrics) as server:
        before = server.app.state.gentron.service
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(answers) > 5)
            wanted[0] = tiny_bundle.parent / "nowhere"
            server.server.reload()
            until(lambda: server.metric("gentron_reloads_total", outcome="failed") == 1)
            assert "reload failed, the bundle stays as it was: bundle" in caplog.text
            wanted[0] = tiny_video_bundle
            server.server.reload()
            until(lambda: server.metric("gentron_reloads_total", outcome="completed") == 1)
            count = len(answers)
            until(lambda: len(answers) > count + 8)
            until(lambda: before.pipeline._engines._closed)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert server.get("/v1/models").json()["data"][0]["id"] == second
        digest = server.app.state.gentron.service.pipeline.bundle.digest
        assert server.metric("gentron_bundle_info", name=second, digest=digest) == 1
        until(lambda: server.metric("gentron_requests_running") == 0)
    seen = set()
    for seed, answer in answers:
        assert answer.status_code == 200, answer.text
        name = answer.json()["gentron"]["bundle"]
        assert np.abs(pixels(answer) - expected[name, seed]).max() <= 1
        seen.add(name)
    assert seen == {first, second}


def test_a_bundle_that_cannot_be_warmed_up_does_not_take_over(tiny_pipeline, monkeypatch, caplog):
    services: list[Service] = []

    async def fail(self, sizes):
        if len(services) > 1:
            raise MemoryError

    def open_service() -> Service:
        services.append(Service(tiny_pipeline))
        return services[-1]

    monkeypatch.setattr(Service, "warm_up", fail)
    with Running(open_service, Metrics()) as server:
        done = asyncio.run_coroutine_threadsafe(
            server.app.state.reloader.reload(), server.server._loop
        )
        assert done.result(60) is False
        assert server.ask(1).status_code == 200
    assert "reload failed, the bundle stays as it was: no memory" in caplog.text
    assert not services[1].healthy


def test_there_is_memory_for_a_second_bundle_or_it_is_not_loaded(tiny_bundle, monkeypatch):
    from gentron.errors import ResourceError
    from gentron.runtime import residency

    residency.check_room_beside(str(tiny_bundle), None)
    monkeypatch.setattr(residency, "available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="a second bundle takes about"):
        residency.check_room_beside(str(tiny_bundle), "fp16")
    with pytest.raises(BundleError, match="was not found"):
        residency.check_room_beside("nowhere", None)
