"""gentron-eval: does a video model show what it was asked for, and does it move that way?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.common import run_command, say, warn
from gentron.cli.judging import bundle_settings, font_scorer, need_train, part_progress
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.cli.filming import Camera
    from gentron.runtime import Pipeline
    from gentron.train.clip_pictures import Shown
    from gentron.train.clip_prompts import ClipPrompt
    from gentron.train.clip_report import Filmed
    from gentron.train.clip_score import ClipVerdict, Filmer, Sight
    from gentron.train.scorer import TemplateScorer

SCALES = (1.0, 1.1, 1.2, 1.3)  # section 3.3.2
KNOWN = 4  # kinds of clips whose answer is known
LEAST_FRAMES = 3  # a way that turns back takes three


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle")
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR",
              help="For tables, pictures, clips; run again to go on after a stop.")  # fmt: skip
@click.option("--against", metavar="BUNDLE", help="Another model of the same nouns, beside it.")
@click.option("--motions", is_flag=True, help="Also sweep motion-free guidance: 1.0, 1.1, 1.2, "
              "1.3 on the same seeds.")  # fmt: skip
@click.option("--sample", type=click.IntRange(min=2), metavar="N",
              help="At most N of the 40 prompts, always the same ones.")  # fmt: skip
@click.option("--takes", type=click.IntRange(1, 64), default=1, show_default=True,
              help="Clips of each prompt, with seeds of their own.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 65), default=0, show_default=True,
              help="Of the first take.")  # fmt: skip
@click.option("--frames", type=int, help="[as many as the model was trained with]")
@click.option("--steps", type=click.IntRange(min=1), help="[the bundle's default]")
@click.option("--solver", help="[the bundle's default]")
@click.option("--guidance", type=float, help="[the bundle's default]")
@click.option("--motion", type=float, help="Motion-free guidance [the bundle's default].")
@click.option("--backend", help="See gentron-run doctor.")
@click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf.")
@click.version_option(gentron.__version__)
def cli(bundle: str, against: str | None, **options: Any) -> None:
    """Ask BUNDLE, a packaged name or a folder, for forty fixed clips and judge them.

    Half of the pairs of thing and motion were never shown in training. Beside the model stands what
    the same evaluator makes of real clips, of things that stand still, and of noise.
    """
    need_train()
    request = Request(**options)
    bundles = [bundle] if against is None else [bundle, against]
    _evaluate(request, bundles)


@dataclass(frozen=True)
class Request:
    """What is asked of every bundle."""

    report: Path | None
    motions: bool
    sample: int | None
    takes: int
    seed: int
    frames: int | None
    steps: int | None
    solver: str | None
    guidance: float | None
    motion: float | None
    backend: str | None
    font: Path | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.seed + take for take in range(self.takes))

    def scales(self, motion: float) -> tuple[float, ...]:
        """Of motion-free guidance, the one to report first."""
        return tuple(dict.fromkeys((motion, *(SCALES if self.motions else ()))))

    def options(self, pipe: Pipeline) -> dict[str, Any]:
        """The bundle's own where nothing was given; raises RequestError for what cannot be."""
        config = pipe.bundle.config
        if not config.temporal:
            raise RequestError(
                "bundle",
                f"{pipe.bundle.manifest.name} draws single images; judge it by gentron-train score",
            )
        frames = config.sample_frames if self.frames is None else self.frames
        if frames < LEAST_FRAMES:
            raise RequestError("frames", f"must be {LEAST_FRAMES} or more to show a motion, got "
                               f"{frames}")  # fmt: skip
        complete = pipe.stream(
            "", seed=self.seed, solver=self.solver, steps=self.steps, guidance=self.guidance,
            motion=self.motion, frames=frames,
        ).settings  # fmt: skip
        names = ("frames", "solver", "steps", "guidance", "motion")
        return {name: getattr(complete, name) for name in names}


def _evaluate(request: Request, bundles: Sequence[str]) -> None:
    from gentron.train import clip_report, report
    from gentron.train.clip_prompts import clip_prompts, digest, select_prompts
    from gentron.train.tables import aligned

    names, labels, options = _agree(request, bundles)
    prompts = select_prompts(clip_prompts(names), request.sample)
    scorer, font = font_scorer(request.font, names)
    folder = report.report_folder(request.report) if request.report else None
    filming = request.takes * sum(len(request.scales(own["motion"])) for own in options)
    with part_progress((filming + KNOWN) * len(prompts)) as advance:
        judge = Judge(scorer, prompts, advance)
        known = judge.known(bundles[0], request.seed, options[0]["frames"])
        models = [
            _film(request, bundle, label, own, judge, folder, font)
            for bundle, label, own in zip(bundles, labels, options, strict=True)
        ]
    settings = {"prompts": digest(prompts), "sample": request.sample, "takes": request.takes}
    values = clip_report.report_values(settings, known, models)
    for model in values["models"]:
        say(clip_report.in_words(model).replace("**", "").replace("`", ""))
    say("\n" + aligned(clip_report.score_rows(values), left=2))
    for model in values["models"]:
        if model["motion_scales"]:
            say(f"\nmotion-free guidance of {model['label']}")
            say(aligned(clip_report.sweep_rows(model)))
    if folder:
        clip_report.write_report(folder, values, models)
        say(f"\n{folder / report.REPORT_TEXT}")


def _agree(
    request: Request, bundles: Sequence[str]
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """The nouns, and each bundle's label and settings; before anything takes long."""
    from gentron.runtime import Pipeline
    from gentron.train.prompts import vocabulary

    found: list[list[str]] = []
    labels: list[str] = []
    options = []
    for bundle in bundles:
        with Pipeline.load(bundle, backend=request.backend) as pipe:
            options.append(request.options(pipe))
            found.append(vocabulary(pipe.path))
            name = pipe.bundle.manifest.name
            labels.append(f"{name} ({pipe.path.name})" if name in labels else name)
            if pipe.bundle.manifest.weights == "random":
                warn(f"{bundle}: its weights are random; this shows that everything runs")
    if any(names != found[0] for names in found):
        raise RequestError("against", f"{bundles[1]} has other nouns than {bundles[0]}; compare "
                           "models of one vocabulary")  # fmt: skip
    if any(own["frames"] != options[0]["frames"] for own in options):
        raise RequestError("frames", "the two models film different numbers of frames; name one")
    return found[0], labels, options


@dataclass(frozen=True)
class Judge:
    """The evaluator with its prompts, behind a progress bar."""

    scorer: TemplateScorer
    prompts: Sequence[ClipPrompt]
    advance: Any  # (part, done, of)

    def known(self, bundle: str, seed: int, frames: int) -> dict[str, tuple[ClipVerdict, ...]]:
        """Clips whose answer is known: what the evaluator gets right, and gives away."""
        from gentron.bundle import locate
        from gentron.train import clip_score
        from gentron.train.score import autoencoder_of

        sprites, names = self.scorer.sprites, self.scorer.names
        truth = clip_score.real(sprites, names, seed, frames, still=False)
        filmers: dict[str, Filmer] = {"real": truth}
        if (autoencoder := autoencoder_of(locate(bundle))) is not None:
            filmers["autoencoder"] = clip_score.reconstructed(truth, autoencoder)
        filmers["still"] = clip_score.real(sprites, names, seed, frames, still=True)
        filmers["noise"] = clip_score.noise(seed, frames)
        return {name: self.see(name, filmer)[0] for name, filmer in filmers.items()}

    def see(self, part: str, filmer: Filmer) -> tuple[tuple[ClipVerdict, ...], tuple[Sight, ...]]:
        from gentron.train.clip_score import judge_clips

        return judge_clips(
            self.scorer, self.prompts, filmer, lambda done, of: self.advance(part, done, of)
        )

    def takes(
        self, camera: Camera, motion: float, seeds: Sequence[int], part: str
    ) -> tuple[tuple[ClipVerdict, ...], tuple[ClipVerdict, ...], tuple[Shown, ...]]:
        """Verdicts of every take, the same clips against other prompts, and the first take."""
        from gentron.train.clip_pictures import Shown
        from gentron.train.clip_score import judge_others

        verdicts: tuple[ClipVerdict, ...] = ()
        others: tuple[ClipVerdict, ...] = ()
        shown: tuple[Shown, ...] = ()
        for take, seed in enumerate(seeds):
            name = f"{part}, take {take + 1}" if len(seeds) > 1 else part
            found, sights = self.see(name, camera.filmer(motion, seed))
            verdicts += found
            others += judge_others(self.scorer.names, self.prompts, sights)
            shown = shown or tuple(
                Shown(camera.filmed[motion, seed, v.prompt.text], v, s.places)
                for v, s in zip(found, sights, strict=True)
            )
            camera.filmed.clear()
        return verdicts, others, shown


def _film(
    request: Request,
    bundle: str,
    label: str,
    options: dict[str, Any],
    judge: Judge,
    folder: Path | None,
    font: str,
) -> Filmed:
    """Everything about one bundle."""
    from gentron.cli.filming import Camera
    from gentron.runtime import Pipeline
    from gentron.train.clip_report import Filmed, Swept

    fixed = {name: value for name, value in options.items() if name != "motion"}
    with Pipeline.load(bundle, backend=request.backend) as pipe:
        camera = Camera(pipe, fixed, folder)
        taken = {
            scale: judge.takes(camera, scale, request.seeds, f"{label}, motion {scale:g}")
            for scale in request.scales(options["motion"])
        }
        settings = {
            **bundle_settings(pipe, judge.scorer.names, font),
            **options,
            "seed": request.seed,
            **camera.engines,
        }
    verdicts, others, shown = taken[options["motion"]]
    sweep = {scale: taken[scale] for scale in SCALES if request.motions}
    return Filmed(
        label,
        settings,
        verdicts,
        others,
        shown,
        tuple(Swept(scale, swept) for scale, (swept, _, _) in sweep.items()),
        {scale: scale_shown for scale, (_, _, scale_shown) in sweep.items()},
    )


def main() -> None:
    run_command(cli)
