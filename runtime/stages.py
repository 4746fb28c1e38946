"""What happens to a request beside the steps: text and conditioning before, decoding after.

Each has a thread of its own. A preview waits for every finished request's decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gentron.errors import CancelledError, DeadlineError, NonFiniteError, RefusedError
from gentron.runtime.generation import RANDOM_WEIGHTS
from gentron.runtime.observer import Observer
from gentron.runtime.pipeline import Pipeline
from gentron.runtime.preview import predicted_clean
from gentron.runtime.result import Result
from gentron.runtime.step_batch import Member
from gentron.runtime.tables import Tables
from gentron.runtime.ticket import Progress
from gentron.runtime.work import Work, conditioning_of
from gentron.runtime.workers import Worker

Floats = npt.NDArray[np.float32]
PictureFilter = Callable[[npt.NDArray[np.uint8]], str | None]  # [B, F, H, W, 3] -> why not
FINAL, PREVIEW = 0, 1
OUTCOMES = ((CancelledError, "cancelled"), (DeadlineError, "expired"), (RefusedError, "refused"))


def outcome_of(error: Exception) -> str:
    """What metrics call it."""
    return next((name for kind, name in OUTCOMES if isinstance(error, kind)), "failed")


class Stages:
    """Owns the two threads; every request that enters ends with one result or one error."""

    def __init__(self, pipeline: Pipeline, tables: Tables, observer: Observer):
        self.picture_filter: PictureFilter = lambda pictures: None
        self.on_end: Callable[[Work], None] = lambda work: None
        self._pipeline, self._tables, self._observer = pipeline, tables, observer
        self._before = Worker("gentron-text")
        self._after = Worker("gentron-decode")

    def prepare(
        self, work: Work, *, done: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        def run() -> None:
            try:
                self._prepare(work)
            except Exception as error:
                failed(error)
            else:
                done()

        self._before.submit(run)

    def preview(self, work: Work, before: Floats, after: Floats, seconds: float) -> None:
        """States [B, 3, F, C, h, w] on both sides of the step just taken."""
        step = work.done_steps - 1

        def run() -> None:
            started = time.perf_counter()
            clean = self._clean(work, step, before, after)
            pictures = self._pipeline.decode(clean[:, :1])[:, 0]
            self._observer.staged("preview", time.perf_counter() - started)
            work.on_progress(Progress(step, work.request.settings.steps, seconds, pictures))

        work.to_preview.append(run)
        self._after.submit(lambda: self._draw_previews(work, 1), PREVIEW)

    def _draw_previews(self, work: Work, most: int) -> None:
        """The next ones that it waits for, unless there is nobody to see them."""
        for _ in range(min(most, len(work.to_preview))):
            draw = work.to_preview.popleft()
            if not work.cancelled:
                draw()

    def decode(self, work: Work, latents: Floats) -> None:
        """Latents [B, F, C, h, w] to the request's result."""

        def run() -> None:
            try:
                self._draw_previews(work, len(work.to_preview))  # before it, not those of others
                result = self._decode(work, latents)
            except Exception as error:
                self.fail(work, error)
            else:
                self._end(work, "completed")
                work.on_result(result)

        self._after.submit(run, FINAL)

    def fail(self, work: Work, error: Exception) -> None:
        self._end(work, outcome_of(error))
        work.on_error(error)

    def close(self) -> None:
        """After all that was handed in has ended."""
        self._before.close()
        self._after.close()

    def _prepare(self, work: Work) -> None:
        if work.cancelled:
            raise CancelledError("the request was cancelled")
        config, request = self._pipeline.bundle.config, work.request
        started = time.perf_counter()
        prompts = request.prompts
        encoded = {text.prompt: text for text in self._pipeline._text.encode(prompts)}
        work.warnings += [*request.warnings, *request.lost_words(encoded)]
        seconds = time.perf_counter() - started
        self._observer.staged("text", seconds)
        work.report("text", seconds, len(set(prompts) - {""}) * len(config.text))
        started = time.perf_counter()
        samples = request.samples(encoded)
        work.members = [Member(s, s.initial_noise(request.shape)) for s in samples]
        size = (request.settings.height, request.settings.width)
        work.lease = self._tables.prepare(
            self._pipeline._engines, conditioning_of(work, config), size
        )
        seconds = time.perf_counter() - started
        self._observer.staged("condition", seconds)
        work.report("condition", seconds, work.lease.calls)

    def _clean(self, work: Work, step: int, before: Floats, after: Floats) -> Floats:
        schedule, clean = self._pipeline.bundle.schedule, []
        for row, member in enumerate(work.members):
            sample, shape = member.sample, work.request.shape
            noise = sample.noise(step, shape) if sample.needs_noise(step) else None
            clean.append(
                predicted_clean(schedule, sample.table, step, before[row], after[row], noise)
            )
        return np.stack(clean)

    def _decode(self, work: Work, latents: Floats) -> Result:
        if work.cancelled:
            raise CancelledError("the request was cancelled")
        if not np.isfinite(latents).all():
            raise NonFiniteError("denoiser: the latents are not finite after the last step")
        work.report("denoise", work.denoise_seconds, work.calls)
        self._observer.staged("denoise", work.denoise_seconds)
        started = time.perf_counter()
        videos = self._pipeline.decode(latents)
        seconds = time.perf_counter() - started
        self._observer.staged("decode", seconds)
        work.report("decode", seconds, latents.shape[0] * latents.shape[1])
        if reason := self.picture_filter(videos):
            raise RefusedError(f"the picture was refused: {reason}")
        return self._result(work, latents, videos)

    def _result(self, work: Work, latents: Floats, videos: npt.NDArray[np.uint8]) -> Result:
        pipeline, settings = self._pipeline, work.request.settings
        manifest = pipeline.bundle.manifest
        random = [RANDOM_WEIGHTS] if manifest.weights == "random" else []
        return Result(
            videos=videos,
            latents=latents,
            settings=settings,
            seeds=tuple(settings.seed + k for k in range(settings.batch)),
            stages=tuple(work.reports),
            components=pipeline._engines.infos,
            bundle=manifest.name,
            digest=pipeline.bundle.digest,
            weights=manifest.weights,
            warnings=(*random, *work.warnings),
        )

    def _end(self, work: Work, outcome: str) -> None:
        self._observer.finished(outcome, time.monotonic() - work.arrived)
        work.trace.end(outcome)
        self.on_end(work)
