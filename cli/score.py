"""How `gentron-train score`, `sweep` and `card` do their work: pictures through the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gentron.cli.common import say, warn
from gentron.cli.judging import bundle_settings, font_scorer, part_progress
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime import Pipeline
    from gentron.runtime.generation import Generation
    from gentron.train.prompts import Prompt
    from gentron.train.score import Artist, SetScore
    from gentron.train.scorer import TemplateScorer

JOBS = 2  # pictures drawn at once: small models leave cores idle between their operators
PICTURES = "pictures"  # folder of the report


@dataclass
class Drawer:
    """Draws prompts through a pipeline. With a folder, pictures are kept there and drawn once."""

    pipe: Pipeline
    seed: int
    options: Mapping[str, Any]
    folder: Path | None = None
    engines: dict[str, str] = field(default_factory=dict)  # what drew the last picture
    drawn: dict[tuple[str, int], Any] = field(default_factory=dict)  # (set, row) -> [H, W, 3]

    def artist(self, name: str) -> Artist:
        """For one set of prompts; pictures come in order while later ones are being drawn."""
        import torch

        def draw(prompts: Sequence[Prompt]) -> Iterator[Any]:
            folder = self._folder_of(name)
            pool = ThreadPoolExecutor(JOBS)
            try:
                pixels = pool.map(lambda prompt: self._picture(prompt.text, folder), prompts)
                for row, picture in enumerate(pixels):
                    self.drawn[name, row] = picture
                    yield torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
            finally:
                pool.shutdown(cancel_futures=True)

        return draw

    def _folder_of(self, name: str) -> Path | None:
        from gentron.train.report import report_folder

        return None if self.folder is None else report_folder(self.folder / PICTURES / name)

    def _picture(self, text: str, folder: Path | None) -> Any:
        from gentron.runtime.image_file import default_name, save_png
        from gentron.train.prompts import noise_seed

        seed = noise_seed(text, self.seed)
        generation = self.pipe.stream(text, seed=seed, **self.options)
        file = folder / f"{default_name(text, seed)}.png" if folder else None
        if file is not None and (kept := self._kept(file, generation)) is not None:
            return kept
        for _ in generation:
            pass
        result = generation.result()
        metadata = result.metadata(0)
        self._remember(metadata)
        if file is not None:
            save_png(result.images[0], metadata, output=file, name=file.stem)
        return result.images[0]

    def _kept(self, file: Path, generation: Generation) -> Any:
        """The file's pixels if this very bundle drew them with these very settings."""
        import numpy as np
        from PIL import Image

        from gentron.runtime.image_file import read_metadata

        if not file.is_file():
            return None
        try:
            metadata = read_metadata(file)
        except RequestError:  # not a picture of ours: drawn anew
            return None
        wanted = {**vars(generation.settings), "digest": self.pipe.bundle.digest}
        if any(metadata.get(key) != value for key, value in wanted.items()):
            return None
        self._remember(metadata)
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))

    def _remember(self, metadata: Mapping[str, Any]) -> None:
        engine = metadata["engines"]["denoiser"]
        self.engines = {name: engine[name] for name in ("backend", "device", "precision")}


@dataclass(frozen=True)
class Request:
    """What score and sweep have in common."""

    bundle: str
    seed: int
    solver: str | None
    steps: int | None
    guidance: float | None
    font: Path | None
    report: Path | None
    sample: int | None
    precision: str | None = None

    def settings(self, pipe: Pipeline) -> dict[str, Any]:
        """The bundle's defaults where nothing was given; raises RequestError for what cannot be."""
        complete = pipe.stream(
            "", seed=self.seed, solver=self.solver, steps=self.steps, guidance=self.guidance
        ).settings
        return {name: getattr(complete, name) for name in ("solver", "steps", "guidance")}


def run_score(request: Request, sets: Sequence[str] | None, verbose: bool) -> None:
    from gentron.runtime import Pipeline
    from gentron.train import prompts, report
    from gentron.train.tables import aligned, score_rows

    with Pipeline.load(request.bundle, precision=request.precision) as pipe:
        names = prompts.vocabulary(pipe.path)
        chosen = prompts.select_sets(prompts.prompt_sets(names), sets, request.sample)
        scorer, font = font_scorer(request.font, names)
        options = request.settings(pipe)
        folder = report.report_folder(request.report) if request.report else None
        drawer = Drawer(pipe, request.seed, options, folder)
        results = _score(drawer, scorer, chosen)
        settings = {
            **bundle_settings(pipe, names, font),
            **options,
            "seed": request.seed,
            "sample": request.sample,
            **drawer.engines,
            "prompts": prompts.digest(chosen),
        }
    values = report.report_values(settings, results)
    if verbose:
        _each_picture(results)
    say(aligned(score_rows(values), left=2))
    say("")
    say(_legend(settings, results))
    if folder:
        report.write_report(folder, settings, results, lambda *key: drawer.drawn[key])
        say(f"{folder / report.REPORT_TEXT}")


def _score(
    drawer: Drawer, scorer: TemplateScorer, chosen: Mapping[str, tuple[Prompt, ...]]
) -> tuple[SetScore, ...]:
    """Real pictures first: they take a minute, and say at once if the scorer is at fault."""
    from gentron.train.score import autoencoder_of, noise, real, reconstructed, score_sets

    truth = real(scorer.sprites, scorer.names, drawer.seed)
    known = {"real": truth}
    if (autoencoder := autoencoder_of(drawer.pipe.path)) is not None:
        known["autoencoder"] = reconstructed(truth, autoencoder)
    known["noise"] = noise(drawer.seed)
    total = (len(known) + 1) * sum(map(len, chosen.values()))
    with part_progress(total) as advance:
        return score_sets(
            scorer, chosen, drawer.artist, known,
            watch=lambda name, column, done, of: advance(f"{name}, {column}", done, of),
        )  # fmt: skip


def run_sweep(request: Request) -> None:
    from gentron.runtime import Pipeline
    from gentron.solvers import solver_table, solvers_for
    from gentron.train import prompts, report, sweep
    from gentron.train.tables import aligned, guidance_rows, sweep_rows

    with Pipeline.load(request.bundle, precision=request.precision) as pipe:
        names = prompts.vocabulary(pipe.path)
        sample = request.sample or sweep.SAMPLE
        asked = prompts.select_sets(prompts.prompt_sets(names), ["nouns"], sample)
        scorer, font = font_scorer(request.font, names)
        options = request.settings(pipe)
        folder = report.report_folder(request.report) if request.report else None
        settings = {
            **bundle_settings(pipe, names, font),
            **options,
            "seed": request.seed,
            "prompts": prompts.digest(asked),
            "sample": len(asked["nouns"]),
        }
        cells = sweep.plan(solvers_for(pipe.bundle.schedule), sweep.Cell(**options))

        def model(cell: sweep.Cell) -> Artist:
            return Drawer(pipe, request.seed, cell._asdict()).artist("nouns")

        def walk(cell: sweep.Cell) -> tuple[bytes, bytes, float]:
            table = solver_table(cell.solver, pipe.bundle.schedule, cell.steps)
            return table.timesteps.tobytes(), table.updates.tobytes(), cell.guidance

        with part_progress(len(cells) * len(asked["nouns"])) as advance:
            found = sweep.run_sweep(
                cells, asked["nouns"], scorer, model, settings, folder,
                watch=lambda cell, done: advance(
                    f"{cell.solver}, {cell.steps} steps, guidance {cell.guidance:g}",
                    done, len(asked["nouns"]),
                ),
                walk=walk,
            )  # fmt: skip
    say(f"first choice, {settings['sample']} nouns, guidance {options['guidance']:g}")
    say(aligned(sweep_rows(found)))
    say(f"\n{options['solver']}, {options['steps']} steps")
    say(aligned(guidance_rows(found)))
    if folder:
        say(f"\n{folder / sweep.SWEEP_TEXT}")


def _each_picture(results: Sequence[SetScore]) -> None:
    for result in results:
        for verdict in sorted(result.verdicts["generated"], key=lambda v: [-r for r in v.ranks]):
            ranks = ", ".join(str(rank + 1) for rank in verdict.ranks)
            say(
                f"{verdict.prompt.text:<44} rank {ranks:>8}, saw {' + '.join(verdict.saw)} "
                f"on {verdict.background}, size {verdict.size:.2f}"
            )


def _legend(settings: Mapping[str, Any], results: Sequence[SetScore]) -> str:
    worst = min(
        (result.shares("real")[check], result.name, check)
        for result in results
        for check in result.shares("real")
    )
    if worst[0] < 0.9:
        warn(
            f"the scorer itself is right on only {worst[0]:.0%} of real renderings ({worst[1]}, "
            f"{worst[2]}); read the generated column against that, or pass the --font the model "
            "was trained with"
        )
    return (
        f"{settings['bundle']} {settings['digest'][:12]}, {settings['solver']}, "
        f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {settings['seed']}. "
        f"Judged by templates of the font among {settings['nouns']} nouns.\n"
        "real, autoencoder: what the scorer gets right on true pictures. noise, other prompt's: "
        "what is had for free."
    )
