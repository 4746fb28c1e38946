"""One request on its way: steps, previews, then pictures or frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.errors import NonFiniteError, RequestError
from gentron.guidance import guidance_branches, unguided_steps
from gentron.latents import latent_size
from gentron.noise import check_seed
from gentron.runtime.loop import DenoiseLoop, LoopStep
from gentron.runtime.preview import predicted_clean
from gentron.runtime.result import Result, Settings, StageClock
from gentron.runtime.sample import UNGUIDED, Sample
from gentron.solvers import solver_table

if TYPE_CHECKING:
    from gentron.runtime.pipeline import Pipeline

MAX_BATCH = 64
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
        _check_settings(settings)
        _check_frames(settings, bundle.config)
        height, width = latent_size(
            bundle.config, bundle.vae_factor, settings.width, settings.height
        )
        self._shape = (settings.frames, bundle.config.latent_channels, height, width)
        self._table = solver_table(
            settings.solver, bundle.schedule, settings.steps, eta=settings.eta
        )
        moving = bundle.config.temporal and settings.frames > 1
        self._branches = guidance_branches(settings.guidance, settings.motion, moving=moving)
        sigmas = bundle.schedule.sigmas(self._table.timesteps)
        self._unguided = unguided_steps(settings.guidance_interval, sigmas)
        self._clock = StageClock()
        self._loop: DenoiseLoop | None = None
        self._latents: npt.NDArray[np.float32] | None = None
        self._steps = self._run()
        self._result: Result | None = None
        self.warnings: list[str] = []
        if bundle.manifest.weights == "random":
            self.warnings.append(RANDOM_WEIGHTS)
        if len(self._unguided) == len(sigmas):
            self._branches = UNGUIDED
            self.warnings.append(
                f"guidance_interval: no step lies in it, so none is guided; the noise levels of "
                f"these steps are {sigmas.max():.3g} to {sigmas.min():.3g}"
            )

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
            noise = sample.noise(index, self._shape) if sample.needs_noise(index) else None
            clean.append(
                predicted_clean(schedule, sample.table, index, before[row], after[row], noise)
            )
        return self._pipeline.decode(np.stack(clean)[:, :1])[:, 0]

    def _run(self) -> Iterator[Step]:
        pipeline, settings, clock = self._pipeline, self.settings, self._clock
        with clock.stage("text") as counts:
            branches = self._branches + (UNGUIDED if self._unguided else ())
            needed = [settings.prompt] * any(b.text for b in branches)
            needed += [settings.negative] * any(not b.text for b in branches)
            pipeline._engines.check_open()
            encoded = {text.prompt: text for text in pipeline._text.encode(needed)}
            counts["calls"] = len(set(needed) - {""}) * len(pipeline.bundle.config.text)
        self._warn_lost(encoded)
        unused = next(iter(encoded.values()))
        samples = [
            Sample(
                self._table,
                self._branches,
                prompt=encoded.get(settings.prompt, unused),
                negative=encoded.get(settings.negative, unused),
                seed=settings.seed + k,
                unguided=self._unguided,
            )
            for k in range(settings.batch)
        ]
        with clock.stage("condition") as counts:
            loop = DenoiseLoop(
                pipeline.bundle.config,
                pipeline._engines,
                samples,
                self._shape,
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

    def _warn_lost(self, encoded: dict[str, Any]) -> None:
        for field, text in (("prompt", self.settings.prompt), ("negative", self.settings.negative)):
            if text in encoded and encoded[text].lost:
                self.warnings.append(
                    f"{field}: too long for the text encoder; these words were cut off: "
                    f"{encoded[text].lost!r}"
                )

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


def _check_settings(settings: Settings) -> None:
    for field in ("prompt", "negative"):
        if not isinstance(getattr(settings, field), str):
            raise RequestError(field, f"must be text, got {getattr(settings, field)!r}")
        try:
            getattr(settings, field).encode()
        except UnicodeEncodeError as error:
            raise RequestError(field, f"is not valid UTF-8 text: {error.object!r}") from error
    for field in ("seed", "batch", "width", "height", "frames"):
        value = getattr(settings, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(field, f"must be a whole number, got {value!r}")
    if not 1 <= settings.batch <= MAX_BATCH:
        raise RequestError("batch", f"must be 1 to {MAX_BATCH}, got {settings.batch}")
    check_seed(settings.seed, settings.batch)


def _check_frames(settings: Settings, config: GenTronConfig) -> None:
    frames, most = settings.frames, config.max_frames
    if frames == 1:
        return
    if not config.temporal:
        raise RequestError("frames", f"this model draws single images, got {frames}; use 1")
    if not 1 <= frames <= most:
        raise RequestError("frames", f"must be 1 to {most} for this model, got {frames}")
