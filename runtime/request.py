"""A request, checked and complete: what the loop of one request and the service both start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gentron.bundle import Bundle
from gentron.config import GenTronConfig
from gentron.errors import RequestError
from gentron.guidance import Branch, guidance_branches, unguided_steps
from gentron.latents import latent_size
from gentron.noise import check_seed
from gentron.runtime.result import Settings
from gentron.runtime.sample import UNGUIDED, LatentShape, Sample
from gentron.runtime.text import EncodedText
from gentron.solvers import SolverTable, solver_table

MAX_BATCH = 64


@dataclass(frozen=True)
class Request:
    """Settings, and what follows from them before any engine has run."""

    settings: Settings
    shape: LatentShape
    table: SolverTable
    branches: tuple[Branch, ...]
    unguided: frozenset[int] = frozenset()  # steps that run the prompt's branch alone
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle, settings: Settings) -> Request:
        """Raises RequestError that names the setting at fault."""
        _check_settings(settings)
        _check_frames(settings, bundle.config)
        height, width = latent_size(
            bundle.config, bundle.vae_factor, settings.width, settings.height
        )
        table = solver_table(settings.solver, bundle.schedule, settings.steps, eta=settings.eta)
        moving = bundle.config.temporal and settings.frames > 1
        branches = guidance_branches(settings.guidance, settings.motion, moving=moving)
        sigmas = bundle.schedule.sigmas(table.timesteps)
        unguided = unguided_steps(settings.guidance_interval, sigmas)
        warnings: tuple[str, ...] = ()
        if len(unguided) == len(sigmas):
            branches = UNGUIDED
            warnings = (
                f"guidance_interval: no step lies in it, so none is guided; the noise levels of "
                f"these steps are {sigmas.max():.3g} to {sigmas.min():.3g}",
            )
        shape = (settings.frames, bundle.config.latent_channels, height, width)
        return cls(settings, shape, table, branches, unguided, warnings)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        return UNGUIDED if step in self.unguided else self.branches

    @property
    def prompts(self) -> list[str]:
        """Those that some branch reads."""
        branches = self.branches + (UNGUIDED if self.unguided else ())
        needed = [self.settings.prompt] * any(branch.text for branch in branches)
        return needed + [self.settings.negative] * any(not branch.text for branch in branches)

    def samples(self, encoded: Mapping[str, EncodedText]) -> list[Sample]:
        """One for each of the batch; `encoded` holds the `prompts`."""
        settings, unused = self.settings, next(iter(encoded.values()))
        return [
            Sample(
                self.table,
                self.branches,
                prompt=encoded.get(settings.prompt, unused),
                negative=encoded.get(settings.negative, unused),
                seed=settings.seed + k,
                unguided=self.unguided,
            )
            for k in range(settings.batch)
        ]

    def lost_words(self, encoded: Mapping[str, EncodedText]) -> list[str]:
        """A warning for each text that its encoder cut off."""
        texts = (("prompt", self.settings.prompt), ("negative", self.settings.negative))
        return [
            f"{field}: too long for the text encoder; these words were cut off: "
            f"{encoded[text].lost!r}"
            for field, text in texts
            if text in encoded and encoded[text].lost
        ]


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
