"""One request on its way: steps, previews, then pictures or frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gentron.errors import NonFiniteError, RequestError
from gentron.runtime.loop import DenoiseLoop, LoopStep
from gentron.runtime.preview import predicted_clean
from gentron.runtime.request import Request
from gentron.runtime.result import Result, Settings, StageClock

if TYPE_CHECKING:
    from gentron.runtime.pipeline import Pipeline

RANDOM_WEIGHTS = (
    "the weights of this bundle are random: it shows that the pipeline runs and how fast, not "
    "what the model can draw"
)


@dataclass(frozen=True)
class Step:
    """One finished step. `preview()` works until the next step is asked for."""

    index: int  # 0-based
    total: int
    seconds: float
    _generation: Generation

    def preview(self) -> npt.NDArray[np.uint8]:
        """What the pictures are heading for: [B, H, W, 3]. Costs a decode."""
        return self._generation.preview(self.index)


class Generation:
    """One request on its way. Iterate it to the end, then ask for `result()`, or for a video's
    `frames()` one after the other."""

    def __init__(self, pipeline: Pipeline, settings: Settings):
        self._pipeline, self.settings = pipeline, settings
        pipeline._engines.check_open()
        bundle = pipeline.bundle
        self._request = Request.of(bundle, settings)
        self._clock = StageClock()
        self._loop: DenoiseLoop | None = None
        self._latents: npt.NDArray[np.float32] | None = None
        self._steps = self._run()
        self._result: Result | None = None
        self.warnings: list[str] = []
        if bundle.manifest.weights == "random":
            self.warnings.append(RANDOM_WEIGHTS)
        self.warnings += self._request.warnings

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def result(self) -> Result:
        """Everything, decoded; raises RequestError if not every step was run."""
        if self._result is None:
            self._result = self._make_result(np.stack(list(self.frames()), axis=1))
        return self._result

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Raw pixels [B, H, W, 3] of one frame after the other, decoded as they are asked for.

        Raises RequestError if not every step was run, NonFiniteError for a frame that is not.
        """
        latents = self._finished()
        with self._clock.stage("decode") as counts:
            for frame in range(latents.shape[1]):
                yield self._pipeline.decode(latents[:, frame : frame + 1])[:, 0]
                counts["calls"] += len(latents)

    def metadata(self, row: int) -> dict[str, Any]:
        """All that is needed to make sample `row` again; raises RequestError before the end."""
        return self._make_result(np.empty((0, 0, 0, 0, 3), np.uint8)).metadata(row)

    def _finished(self) -> npt.NDArray[np.float32]:
        if self._latents is None:
            raise RequestError("stream", "not finished: iterate over every step, then ask again")
        return self._latents

    def preview(self, index: int) -> npt.NDArray[np.uint8]:
        loop = self._loop
        if loop is None or loop.done != index + 1:
            raise RequestError(
                "preview", f"step {index + 1} has passed; take a preview before the next step"
            )
        before, after = loop.before_and_after()
        schedule, clean = self._pipeline.bundle.schedule, []
        for row, sample in enumerate(loop.samples):
            noise = sample.noise(index, self._request.shape) if sample.needs_noise(index) else None
            clean.append(
                predicted_clean(schedule, sample.table, index, before[row], after[row], noise)
            )
        return self._pipeline.decode(np.stack(clean)[:, :1])[:, 0]

    def _run(self) -> Iterator[Step]:
        pipeline, settings, clock = self._pipeline, self.settings, self._clock
        with clock.stage("text") as counts:
            needed = self._request.prompts
            pipeline._engines.check_open()
            encoded = {text.prompt: text for text in pipeline._text.encode(needed)}
            counts["calls"] = len(set(needed) - {""}) * len(pipeline.bundle.config.text)
        self.warnings += self._request.lost_words(encoded)
        samples = self._request.samples(encoded)
        with clock.stage("condition") as counts:
            loop = DenoiseLoop(
                pipeline.bundle.config,
                pipeline._engines,
                samples,
                self._request.shape,
                (settings.height, settings.width),
            )
            counts["calls"] = loop.condition_calls
        self._loop = loop
        seconds = 0.0
        with pipeline._engines.pinned("denoiser"):
            for step in loop.run():
                seconds += step.seconds
                yield self._step(step)
        clock.add("denoise", seconds, loop.calls)
        latents = loop.latents()
        if not np.isfinite(latents).all():
            raise NonFiniteError("denoiser: the latents are not finite after the last step")
        self._latents = latents
        if settings.frames == 1:
            self.result()

    def _step(self, step: LoopStep) -> Step:
        return Step(step.index, step.total, step.seconds, self)

    def _make_result(self, videos: npt.NDArray[np.uint8]) -> Result:
        pipeline, settings = self._pipeline, self.settings
        return Result(
            videos=videos,
            latents=self._finished(),
            settings=settings,
            seeds=tuple(settings.seed + k for k in range(settings.batch)),
            stages=tuple(self._clock.reports),
            components=pipeline._engines.infos,
            bundle=pipeline.bundle.manifest.name,
            digest=pipeline.bundle.digest,
            weights=pipeline.bundle.manifest.weights,
            warnings=tuple(self.warnings),
        )
