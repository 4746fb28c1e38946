"""A bundle, loaded: prompts in, pictures out. Holds nothing of any request."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.bundle import Bundle, Verify
from gentron.engines import Backend, Engine, EngineOptions, backend_named, bundle_graph
from gentron.engines.graphs import declarations, decoder_default
from gentron.errors import BundleError, GenTronError
from gentron.guidance import Interval, check_interval
from gentron.latents import to_uint8
from gentron.runtime.finite import check_finite
from gentron.runtime.generation import Generation
from gentron.runtime.residency import Residency, plan_memory
from gentron.runtime.result import Result, Settings
from gentron.runtime.text import TextStage


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
        wanted["vae_decoder"] = decoder_precision or decoder_default(bundle, backend)
        try:
            bundle.check_complete()
            declared = declarations(bundle, profiles)
            graphs = {
                name: bundle_graph(bundle, name, backend.graph_precision(chosen), declared)
                for name, chosen in wanted.items()
            }
            plan = plan_memory(bundle, backend, wanted, memory)

            def load(name: str) -> Engine:
                try:
                    if name in plan.streamed:
                        return backend.load_streamed(graphs[name])
                    return backend.load(graphs[name], wanted[name])
                except GenTronError as error:
                    if graphs[name].file.exists():
                        raise
                    raise BundleError(
                        f"{graphs[name].file}: is gone, and {name} has to be loaded; put the "
                        "bundle back where it was, or load another"
                    ) from error

            self._engines = Residency(load, list(graphs), plan.sizes, plan.limit, plan.making)
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
        motion: float | None = None,
        guidance_interval: Interval | None = None,
        frames: int = 1,
        batch: int = 1,
        size: tuple[int, int] | None = None,
    ) -> Generation:
        """A generation that runs as it is iterated, one item per step; stop iterating to cancel.

        Arguments as for `settings`. Raises RequestError at once, naming the argument.
        """
        return self.generate(
            self.settings(
                prompt,
                negative=negative,
                seed=seed,
                steps=steps,
                solver=solver,
                eta=eta,
                guidance=guidance,
                motion=motion,
                guidance_interval=guidance_interval,
                frames=frames,
                batch=batch,
                size=size,
            )
        )

    def settings(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        eta: float = 0.0,
        guidance: float | None = None,
        motion: float | None = None,
        guidance_interval: Interval | None = None,
        frames: int = 1,
        batch: int = 1,
        size: tuple[int, int] | None = None,
    ) -> Settings:
        """A request with the bundle's defaults filled in; not checked yet.

        `size` is (width, height) in pixels, `seed` 0 to 2**64 - 1 (random if None; sample k of the
        batch has seed + k), `guidance` lambda_T and `motion` lambda_M of equation 6; both are 1
        in steps whose noise level (`NoiseSchedule.sigmas`) is outside low < sigma <= high of
        `guidance_interval`. More than one of `frames` is a video; `motion` has no meaning for an
        image. Everything not given comes from the bundle's defaults.
        """
        defaults = self.bundle.manifest.defaults
        width, height = size or self.bundle.native_size
        interval = guidance_interval
        return Settings(
            prompt=prompt,
            negative=negative,
            seed=secrets.randbits(32) if seed is None else seed,
            steps=defaults.steps if steps is None else steps,
            solver=defaults.solver if solver is None else solver,
            eta=eta,
            guidance=defaults.guidance if guidance is None else guidance,
            motion=defaults.motion if motion is None else motion,
            width=width,
            height=height,
            frames=frames,
            batch=batch,
            guidance_interval=None if interval is None else check_interval(interval),
        )

    def stream_video(
        self, prompt: str, *, frames: int | None = None, **options: Any
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Frames [B, H, W, 3] as they are decoded; the model's own number of them by default.

        Options as for `stream`. All steps run before the first frame.
        """
        count = self.bundle.config.sample_frames if frames is None else frames
        generation = self.stream(prompt, frames=count, **options)
        for _ in generation:
            pass
        yield from generation.frames()

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
