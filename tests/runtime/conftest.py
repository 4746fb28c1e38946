"""Samples built by hand, to put into one call what a single request never mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gentron.guidance import Branch
from gentron.runtime import Pipeline
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.sample import Sample
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
