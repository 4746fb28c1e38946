"""A bundle, loaded: prompts in, pictures out. Holds nothing of any request."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.bundle import Bundle, Verify
from gentron.engines import Backend, Engine, EngineOptions, backend_named, bundle_graph
from gentron.engines.graphs import declarations
from gentron.errors import NonFiniteError, RequestError
from gentron.guidance import guidance_branches
from gentron.latents import latent_size, to_uint8
from gentron.noise import check_seed
from gentron.runtime.finite import check_finite
from gentron.runtime.loop import DenoiseLoop, LoopStep
from gentron.runtime.preview import predicted_clean
from gentron.runtime.residency import Residency, component_bytes
from gentron.runtime.result import Result, Settings, StageClock
from gentron.runtime.sample import Sample
from gentron.runtime.text import TextStage
from gentron.solvers import solver_table

MAX_BATCH = 64
RANDOM_WEIGHTS = (
    "the weights of this bundle are random: it shows that the pipeline runs and how fast, not "
    "what the model can draw"
)


class Pipeline:
    """Loads every component of a bundle once; may be called from several threads."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        precision: str | None = None,
        decoder_precision: str | None = None,
        profiles: Sequence[str] = (),
        memory: int | None = None,
    ):
        self.bundle, self.backend = bundle, backend
        precision = precision or backend.precisions[0]
        wanted = dict.fromkeys(bundle.components, precision)
        wanted["vae_decoder"] = decoder_precision or _decoder_precision(bundle, backend)
        try:
            bundle.check_complete()
            declared = declarations(bundle, profiles)
            graphs = {
                name: bundle_graph(bundle, name, backend.graph_precision(chosen), declared)
                for name, chosen in wanted.items()
            }
            sizes = {n: component_bytes(bundle, n, p) for n, p in wanted.items()} if memory else {}
            self._engines = Residency(
                lambda name: backend.load(graphs[name], wanted[name]), list(graphs), sizes, memory
            )
            self._text = TextStage(bundle, self._engines)
        except BaseException:
            backend.close()
            raise

    @classmethod
    def load(
        cls,
        bundle: str | Path = "emoji",
        *,
        backend: str | None = None,
        precision: str | None = None,
        decoder_precision: str | None = None,
        verify: Verify = "remembered",
        profiles: Sequence[str] = (),
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> Pipeline:
        """Opens a bundle by packaged name or folder.

        `backend` is a name of `gentron-run doctor`, the first usable one by default; `precision`
        fp32, bf16 or fp16, the backend's own choice by default. The decoder has its own, because
        many autoencoders overflow float16. `verify` says how files are checked: "remembered" reads
        those that could have changed since they were last checked, "all" every one, "sizes" none.
        `profiles` are shapes to compile for, as gentron-build takes them; `options` say where
        engines come from and how many threads they use. With a `memory` limit in bytes, components
        are loaded when their turn comes and freed for each other. Raises BundleError for a
        missing, damaged, newer or partial bundle, RequestError for an unknown backend or profile,
        BackendError for a backend that cannot run here, ResourceError if one component alone is
        over the limit.
        """
        opened = Bundle.open(bundle, verify=verify)
        made = backend_named(backend, options)
        return cls(opened, made, precision, decoder_precision, profiles, memory)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path

    def __call__(self, prompt: str, **options: Any) -> Result:
        """Generates in one go; options as for `stream`."""
        generation = self.stream(prompt, **options)
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        eta: float = 0.0,
        guidance: float | None = None,
        batch: int = 1,
        size: tuple[int, int] | None = None,
    ) -> Generation:
        """A generation that runs as it is iterated, one item per step; stop iterating to cancel.

        `size` is (width, height) in pixels, `seed` 0 to 2**64 - 1 (random if None; sample k of the
        batch has seed + k), `guidance` lambda_T of equation 6. Everything not given comes from the
        bundle's defaults. Raises RequestError at once, naming the argument.
        """
        defaults = self.bundle.manifest.defaults
        width, height = size or self.bundle.native_size
        settings = Settings(
            prompt=prompt,
            negative=negative,
            seed=secrets.randbits(32) if seed is None else seed,
            steps=defaults.steps if steps is None else steps,
            solver=defaults.solver if solver is None else solver,
            eta=eta,
            guidance=defaults.guidance if guidance is None else guidance,
            motion=1.0,
            width=width,
            height=height,
            frames=1,
            batch=batch,
        )
        return self.generate(settings)

    def generate(self, settings: Settings) -> Generation:
        """`stream` for settings that are complete, as a result or a file carries them."""
        return Generation(self, settings)

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Latents [B, F, C, h, w] -> raw pixels [B, F, H, W, 3], a frame at a time, so that a
        picture never depends on its neighbours and memory not on their number."""
        engine = self._engine("vae_decoder")
        samples = []
        for sample in latents:
            frames = []
            for frame in sample:
                pixels = engine.run({"latents": np.ascontiguousarray(frame[None])})["pixels"]
                check_finite(pixels, "vae_decoder")
                frames.append(to_uint8(pixels)[0])
            samples.append(np.stack(frames))
        return np.stack(samples)

    def close(self) -> None:
        """Frees engines, then the backend; idempotent."""
        self._engines.close()
        self.backend.close()

    def _engine(self, name: str) -> Engine:
        return self._engines[name]

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _decoder_precision(bundle: Bundle, backend: Backend) -> str:
    """The first of the backend's for which there is a graph: a decoder that leaves float16 has
    none in float16."""
    there = bundle.manifest.precisions.get("vae_decoder", ())
    fitting = [p for p in backend.precisions if backend.graph_precision(p) in there]
    return (fitting or backend.precisions)[0]


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
    """One request on its way. Iterate it to the end, then ask for `result()`."""

    def __init__(self, pipeline: Pipeline, settings: Settings):
        self._pipeline, self.settings = pipeline, settings
        pipeline._engines.check_open()
        bundle = pipeline.bundle
        _check_settings(settings)
        height, width = latent_size(
            bundle.config, bundle.vae_factor, settings.width, settings.height
        )
        self._shape = (settings.frames, bundle.config.latent_channels, height, width)
        self._table = solver_table(
            settings.solver, bundle.schedule, settings.steps, eta=settings.eta
        )
        moving = bundle.config.temporal and settings.frames > 1
        self._branches = guidance_branches(settings.guidance, settings.motion, moving=moving)
        self._clock = StageClock()
        self._loop: DenoiseLoop | None = None
        self._steps = self._run()
        self._result: Result | None = None
        self.warnings: list[str] = []
        if bundle.manifest.weights == "random":
            self.warnings.append(RANDOM_WEIGHTS)

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def result(self) -> Result:
        """The pictures; raises RequestError if not every step was run."""
        if self._result is None:
            raise RequestError("stream", "not finished: iterate over every step, then ask again")
        return self._result

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
        return self._pipeline.decode(np.stack(clean))[:, 0]

    def _run(self) -> Iterator[Step]:
        pipeline, settings, clock = self._pipeline, self.settings, self._clock
        with clock.stage("text") as counts:
            needed = [settings.prompt] * any(b.text for b in self._branches)
            needed += [settings.negative] * any(not b.text for b in self._branches)
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
        with clock.stage("decode") as counts:
            images = pipeline.decode(latents)[:, 0]
            counts["calls"] = len(images)
        self._result = self._make_result(images, latents)

    def _step(self, step: LoopStep) -> Step:
        return Step(step.index, step.total, step.seconds, self)

    def _warn_lost(self, encoded: dict[str, Any]) -> None:
        for field, text in (("prompt", self.settings.prompt), ("negative", self.settings.negative)):
            if text in encoded and encoded[text].lost:
                self.warnings.append(
                    f"{field}: too long for the text encoder; these words were cut off: "
                    f"{encoded[text].lost!r}"
                )

    def _make_result(
        self, images: npt.NDArray[np.uint8], latents: npt.NDArray[np.float32]
    ) -> Result:
        pipeline, settings = self._pipeline, self.settings
        return Result(
            images=images,
            latents=latents,
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
    if settings.frames != 1:
        raise RequestError("frames", f"must be 1 for an image, got {settings.frames}")
    check_seed(settings.seed, settings.batch)
