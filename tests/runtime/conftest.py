"""Samples built by hand, to put into one call what a single request never mixes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gentron.guidance import Branch
from gentron.runtime import Pipeline
from gentron.runtime.admission import Bounds
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.sample import Sample
from gentron.runtime.scheduling import Capacity
from gentron.runtime.service import Options, Service
from gentron.solvers import solver_table

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
