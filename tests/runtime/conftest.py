"""Samples built by hand, to put into one call what a single request never mixes."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import uvicorn

from gentron.guidance import Branch
from gentron.runtime import Pipeline
from gentron.runtime.admission import Bounds
from gentron.runtime.http_access import Access
from gentron.runtime.http_api import create_app
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.metrics import Metrics
from gentron.runtime.sample import Sample
from gentron.runtime.scheduling import Capacity
from gentron.runtime.service import Options, Service
from gentron.solvers import solver_table

SMALL = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": 1, "seed": 1}}

SampleMaker = Callable[..., Sample]
LoopRunner = Callable[..., tuple[DenoiseLoop, npt.NDArray[np.float32]]]


@pytest.fixture(scope="session")
def video_pipeline(tiny_video_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_video_bundle) as pipeline:
        yield pipeline


@pytest.fixture
def make_sample(video_pipeline: Pipeline) -> SampleMaker:
    def make(
        solver: str,
        steps: int,
        branches: tuple[Branch, ...],
        prompt: str,
        seed: int,
        *,
        negative: str = "",
        eta: float = 0.0,
    ) -> Sample:
        table = solver_table(solver, video_pipeline.bundle.schedule, steps, eta=eta)
        text, empty = video_pipeline._text.encode([prompt, negative])
        return Sample(table, branches, text, empty, seed)

    return make


@pytest.fixture
def run_loop(video_pipeline: Pipeline) -> LoopRunner:
    """Runs samples together at 3 frames of 8x8 latents; returns the loop and final latents."""

    def run(*samples: Sample) -> tuple[DenoiseLoop, npt.NDArray[np.float32]]:
        config = video_pipeline.bundle.config
        loop = DenoiseLoop(config, video_pipeline._engines, samples, (3, 4, 8, 8))
        for _ in loop.run():
            pass
        return loop, loop.latents()

    return run


MANY = Options(bounds=Bounds(requests=1000), capacity=Capacity(all_ride=True))
Work = Callable[[Service], Awaitable[Any]]


@pytest.fixture
def serve() -> Callable[..., Any]:
    """Runs `work(service)` on an open service; what its requests held has come back afterwards."""

    def run_all(pipeline: Pipeline, work: Work, options: Options = MANY) -> Any:
        async def run() -> Any:
            async with Service(pipeline, options) as service:
                found = await work(service)
                await _quiet(service)
                return found

        return asyncio.run(run())

    return run_all


async def _quiet(service: Service) -> None:
    """Everything that requests held comes back."""
    for _ in range(400):
        tables = service.scheduler._tables
        held = (tables.modulation.in_use, tables.texts.in_use, service.admission.taken)
        if held == (0, 0, 0) and not service.scheduler._batches:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(held)


@pytest.fixture
def faults(video_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., None]]:
    """Called before every denoiser call with (rows, the seeds that it computes); may raise."""
    hooks: list[Callable[..., None]] = []
    engine = video_pipeline._engines["denoiser"]
    bind = engine.bind

    def watched(buffers: Any) -> Any:
        call = bind(buffers)

        class Call:
            def run(self) -> None:
                for hook in hooks:
                    hook(buffers["row_sample"].shape[0])
                call.run()

        return Call()

    monkeypatch.setattr(engine, "bind", watched, raising=False)
    return hooks


class Listening:
    """The server on a free port of the loopback, in a thread."""

    def __init__(self, pipeline: Any, options: Options | None = None, **given: Any):
        self.metrics = Metrics()
        observed = replace(options or Options(), observer=self.metrics)
        self.app = create_app(
            lambda: Service(pipeline, observed), self.metrics, [(16, 16)], **given
        )
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="warning", access_log=False)
        )
        self.thread = threading.Thread(target=lambda: self.server.run([self.socket]))

    def __enter__(self) -> Self:
        self.thread.start()
        self.until(lambda: self.server.started)
        self.until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    @staticmethod
    def until(ready: Callable[[], Any], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def ask(
        self,
        path: str = "/v1/images/generations",
        key: str | None = None,
        body: Any = SMALL,
        method: str = "POST",
        **headers: str,
    ) -> httpx.Response:
        head = {name.replace("_", "-"): value for name, value in headers.items()}
        head |= {"authorization": f"Bearer {key}"} if key else {}
        content = {"json": body} if method == "POST" else {}
        return httpx.request(method, self.url + path, headers=head, timeout=60, **content)

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            found = b""
            while part := connection.recv(65536):
                found += part
        return found


@pytest.fixture(scope="session")
def listening() -> type[Listening]:
    return Listening


# The page at `/`, in a browser.

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Site(Listening):
    """A call of the denoiser takes `delay` seconds longer."""

    delay = 0.0

    def __init__(self, pipeline: Any, access: Access | None = None):
        super().__init__(pipeline, Options(bounds=Bounds(steps=500)), access=access)


@pytest.fixture(scope="module")
def site(video_pipeline) -> Iterator[Site]:
    engine = video_pipeline._engines["denoiser"]
    bind, running = engine.bind, Site(video_pipeline)

    class Paced:
        def __init__(self, buffers: Any):
            self.call = bind(buffers)

        def run(self) -> None:
            time.sleep(running.delay)
            self.call.run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "bind", Paced, raising=False)
        with running:
            yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser, site) -> Iterator[Any]:
    """`visit(url, **context)` opens the page anew; nothing may go wrong in it, or go elsewhere."""
    site.delay, wrong, contexts = 0.0, [], []

    def open_page(url: str | None = None, script: str = "", **options: Any) -> Any:
        url = url or site.url
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        if script:
            tab.add_init_script(script)
        tab.set_default_timeout(20_000)

        def said(message: Any) -> None:  # a refusal of the server is told on the page, and here
            if message.type == "error" and "Failed to load resource" not in message.text:
                wrong.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((url, "blob:")):
                wrong.append(request.url)

        tab.on("console", said)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", asked)
        tab.goto(url)
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def open_site() -> type[Site]:
    """Another server, with `Access`."""
    return Site


@pytest.fixture
def draw() -> Callable[..., None]:
    """`draw(tab, "a cat", steps=2)` fills the form and presses Enter."""

    def fill(tab: Any, prompt: str = "a cat", **settings: object) -> None:
        for name, value in settings.items():
            tab.fill(f"[name={name}]", str(value))
        tab.fill("#prompt", prompt)
        tab.press("#prompt", "Enter")

    return fill
