"""gentron-train: makes the checkpoints that ship with the package."""

from __future__ import annotations

import logging
from pathlib import Path

import click

import gentron
from gentron.cli.common import run_command
from gentron.errors import RequestError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gentron.__version__)
def cli() -> None:
    """Train a small GenTron from nothing, on a CPU."""


@cli.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("training/emoji"),
              show_default=True, help="Resumable state, grids, the checkpoint.")  # fmt: skip
@click.option("--autoencoder-images", type=click.IntRange(min=16), help="Pictures it sees.")
@click.option("--pool-images", type=click.IntRange(min=512), help="Scenes encoded once.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the denoiser, in all.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of weights, scenes and noise.")  # fmt: skip
@click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.")
@click.option("--no-compile", is_flag=True, help="Train without torch.compile (needs no g++).")
def emoji(
    folder: Path,
    autoencoder_images: int | None,
    pool_images: int | None,
    steps: int | None,
    seed: int,
    font: Path | None,
    threads: int | None,
    no_compile: bool,
) -> None:
    """The packaged `emoji` model: captioned pictures, autoencoder, denoiser.

    Stop it at any time and run it again: it goes on where it was. Every few minutes it writes
    FOLDER/grids/*.png (fixed prompts), FOLDER/loss.png and FOLDER/checkpoint.
    """
    try:
        import torch

        from gentron.train.recipe import Recipe, train_emoji
    except ImportError as error:
        raise RequestError(
            "train", f"cannot import {error.name}; run: pip install 'gentron[train]'"
        ) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        torch.set_num_threads(threads)
    given = {
        "autoencoder_images": autoencoder_images,
        "pool_images": pool_images,
        "denoiser_steps": steps,
    }
    recipe = Recipe(seed=seed, **{name: value for name, value in given.items() if value})
    train_emoji(folder, recipe, font=font, compile=not no_compile)
    click.echo(str(folder / "checkpoint"))


@cli.command()
@click.option("-m", "--model", "bundle", default="emoji", show_default=True, metavar="BUNDLE",
              help="Packaged name or folder.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the noise.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Of sampling [the bundle's default].")
@click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf.")
@click.option("-v", "--verbose", is_flag=True, help="One line for each noun.")
def score(bundle: str, seed: int, steps: int | None, font: Path | None, verbose: bool) -> None:
    """Asks BUNDLE for every noun once and judges the pictures with a template scorer.

    Printed beside the scorer's own result on real renderings and on noise.
    """
    import torch

    from gentron.runtime import Pipeline
    from gentron.train.scenes import find_font, load_sprites, nouns
    from gentron.train.score import TemplateScorer, noise, renderings

    names = nouns()
    sprites = load_sprites(find_font(font), names)
    scorer = TemplateScorer(sprites, names)

    with Pipeline.load(bundle) as pipe:

        def drawn(name: str) -> torch.Tensor:
            image = pipe(name, seed=seed, steps=steps).images[0]
            return torch.from_numpy(image).permute(2, 0, 1).float() / 255

        results = {
            "real renderings": scorer.score(renderings(sprites, names, seed)),
            "noise": scorer.score(noise(seed)),
            "generated": scorer.score(drawn),
        }
    if verbose:
        for verdict in sorted(results["generated"].verdicts, key=lambda v: -v.rank):
            click.echo(f"{verdict.asked:<20} rank {verdict.rank + 1:>3}, saw {verdict.choice}")
    for what, result in results.items():
        click.echo(
            f"{what:<16} first choice {result.first:6.1%}, first five {result.first_five:6.1%} "
            f"of {len(names)} nouns"
        )


def main() -> None:
    run_command(cli)
