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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
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


def main() -> None:
    run_command(cli)
