"""gentron-train: makes the checkpoints that ship with the package, and says how good they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.common import run_command
from gentron.cli.judging import need_train
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.cli.score import Request


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gentron.__version__)
def cli() -> None:
    """Train a small GenTron from nothing, on a GPU or a CPU, and score it."""


@cli.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("training/emoji"),
              show_default=True, help="Resumable state, grids, the checkpoint.")  # fmt: skip
@click.option("--recipe", type=click.Choice(("full", "small")), help="How much of everything "
              "[full on a GPU, small on a CPU].")  # fmt: skip
@click.option("--device", help="Of torch: cpu, cuda, cuda:1 [a GPU if there is one].")
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
    recipe: str | None,
    device: str | None,
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
    need_train()
    from gentron.train.recipe import RECIPES, train_emoji

    chosen, size = _prepare_torch(device, recipe, threads)
    given = {
        "autoencoder_images": autoencoder_images,
        "pool_images": pool_images,
        "denoiser_steps": steps,
    }
    wanted = replace(RECIPES[size], seed=seed, **{n: v for n, v in given.items() if v is not None})
    train_emoji(folder, wanted, font=font, device=chosen, compile=not no_compile)
    click.echo(str(folder / "checkpoint"))


@cli.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("training/emoji"),
              show_default=True, help="Of a finished image run.")  # fmt: skip
@click.option("--recipe", type=click.Choice(("full", "small")), help="How much of everything "
              "[full on a GPU, small on a CPU].")  # fmt: skip
@click.option("--device", help="Of torch: cpu, cuda, cuda:1 [a GPU if there is one].")
@click.option("--run", "run_name", default="video", show_default=True,
              help="Names the run's files, so that a folder can hold several.")  # fmt: skip
@click.option("--start", default="denoiser", show_default=True,
              help="The run to go on from: the image run, or another --run.")  # fmt: skip
@click.option(
    "--teacher",
    metavar="RUN",
    help="Learn images from this run's model, to keep what it draws [from the data].",
)
@click.option("--pool-images", type=click.IntRange(min=512), help="Scenes encoded once.")
@click.option("--clips", type=click.IntRange(min=64), help="Clips encoded once.")
@click.option("--image-share", type=click.FloatRange(0, 1), metavar="S",
              help="Of the steps see images [0.4].")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="In all.")
@click.option("--image-batch", type=click.IntRange(min=1), metavar="N",
              help="Images in a step that sees images [512 on a GPU, else 64].")  # fmt: skip
@click.option("--clip-batch", type=click.IntRange(min=1), metavar="N",
              help="Clips in a step that sees clips [64 on a GPU, else 8].")  # fmt: skip
@click.option("--motion-free", type=click.FloatRange(0, 1), metavar="P",
              help="Share of clips whose frames see only themselves [0.15].")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0, min_open=True),
              help="Learning rate while it is held [0.0005].")  # fmt: skip
@click.option("--optimizer", type=click.Choice(("muon", "adamw")), help="Of the blocks' matrices "
              "[muon]; all else is AdamW's.")  # fmt: skip
@click.option("--lead", type=click.IntRange(min=0), metavar="N",
              help="Of the steps, the first ones: only the ends of clips, forwards and backwards "
              "[300 after an image run, 0 after a video run].")  # fmt: skip
@click.option("--hard-nouns", type=click.IntRange(min=2), metavar="N",
              help="Half of the images in a step show the N nouns that --start draws worst, and "
              "are learned from the data [none].")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of images, clips, noise and new layers.")  # fmt: skip
@click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.")
@click.option("--no-compile", is_flag=True, help="Train without torch.compile (needs no g++).")
def video(
    folder: Path,
    recipe: str | None,
    device: str | None,
    run_name: str,
    start: str,
    teacher: str | None,
    pool_images: int | None,
    clips: int | None,
    image_share: float | None,
    steps: int | None,
    image_batch: int | None,
    clip_batch: int | None,
    motion_free: float | None,
    rate: float | None,
    optimizer: str | None,
    lead: int | None,
    hard_nouns: int | None,
    seed: int,
    font: Path | None,
    threads: int | None,
    no_compile: bool,
) -> None:
    """Teach a trained `emoji` to move: temporal layers, on images and clips together.

    Stop it at any time and run it again: it goes on where it was. Every few minutes it writes
    FOLDER/video-grids/*.png (fixed prompts, a row each) and FOLDER/checkpoint-video.
    """
    need_train()
    from gentron.train.video_recipe import VIDEO_RECIPES, train_emoji_video

    chosen, size = _prepare_torch(device, recipe, threads)
    given: dict[str, Any] = {
        "pool_images": pool_images,
        "clips": clips,
        "image_share": image_share,
        "steps": steps,
        "image_batch": image_batch,
        "clip_batch": clip_batch,
        "motion_free": motion_free,
        "rate": rate,
        "optimizer": optimizer,
        "lead": lead,
        "hard_nouns": hard_nouns,
    }
    wanted = replace(
        VIDEO_RECIPES[size], seed=seed, **{n: v for n, v in given.items() if v is not None}
    )
    train_emoji_video(
        folder,
        wanted,
        font=font,
        device=chosen,
        compile=not no_compile,
        name=run_name,
        start=start,
        teacher=teacher,
    )
    click.echo(str(folder / f"checkpoint-{run_name}"))


@cli.command()
@click.argument("bundle", default="emoji")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("training/emoji"),
              show_default=True, help="To make; empty or absent.")  # fmt: skip
@click.option("--without-motion", is_flag=True,
              help="Also make an image run of it, without its temporal layers.")  # fmt: skip
def unpack(bundle: str, folder: Path, without_motion: bool) -> None:
    """Make BUNDLE the start of more training.

    Its weights become the finished runs of FOLDER, from which `gentron-train video --start RUN`
    goes on.
    """
    need_train()
    from gentron.train.unpack import unpack as unpack_bundle

    run = unpack_bundle(bundle, folder, without_motion=without_motion)
    click.echo(
        f"{folder}: go on with: gentron-train video --folder {folder} --start {run} --run NAME"
    )


def _prepare_torch(device: str | None, recipe: str | None, threads: int | None) -> tuple[Any, str]:
    """The device, and which recipe suits it; raises RequestError for a device that is not there."""
    import torch

    from gentron.train.recipe import best_device

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        torch.set_num_threads(threads)
    try:
        chosen = torch.device(device) if device else best_device()
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            "device", f"{device!r} cannot be used: {reason}; try --device cpu"
        ) from error
    size = recipe or ("full" if chosen.type == "cuda" else "small")
    logging.getLogger(__name__).info("recipe %s on %s", size, chosen)
    return chosen, size


def _scoring(command: Callable[..., None]) -> Callable[..., None]:
    """Options that score and sweep share."""
    options = (
        click.option("-m", "--model", "bundle", default="emoji", show_default=True,
                     metavar="BUNDLE", help="Packaged name or folder."),
        click.option("--report", type=click.Path(path_type=Path), metavar="DIR",
                     help="Write tables and pictures here; run again to go on after a stop."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                     help="Of the noise, and of the pictures drawn by lot."),
        click.option("--steps", type=click.IntRange(min=1), help="[the bundle's default]"),
        click.option("--solver", help="[the bundle's default]"),
        click.option("--guidance", type=float, help="[the bundle's default]"),
        click.option("--precision", help="As for gentron-run: fp32, bf16, fp16, int8."),
        click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@_scoring
@click.option("--sets", metavar="NAMES", help="nouns, colors, unseen-colors, pairs, sizes, "
              "places, synonyms; separated by commas [all].")  # fmt: skip
@click.option("--sample", type=click.IntRange(min=1), metavar="N",
              help="At most N prompts of each set [all].")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="One line for each picture.")
def score(sets: str | None, verbose: bool, **options: Any) -> None:
    """Ask BUNDLE for fixed sets of prompts and judge the pictures.

    The judge compares with renderings of the font and has never seen a generated picture. Its own
    results on real renderings, on noise and on pictures of other prompts stand beside the model's.
    """
    request = _request(options)
    from gentron.cli.score import run_score

    chosen = [name.strip() for name in sets.split(",")] if sets is not None else None
    run_score(request, chosen, verbose)


@cli.command()
@_scoring
@click.option("--sample", type=click.IntRange(min=1), metavar="N",
              help="Nouns to ask for [120].")  # fmt: skip
def sweep(**options: Any) -> None:
    """Score BUNDLE over solvers, step counts and guidance scales.

    Every solver that its kind of prediction allows with 8, 12, 20 and 40 steps, and a few guidance
    scales at --solver and --steps.
    """
    request = _request(options)
    from gentron.cli.score import run_sweep

    run_sweep(request)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR",
              help="Of gentron-train score, and of sweep if it is there.")  # fmt: skip
@click.option("--hours", type=float, help="Training took [from the logs beside CHECKPOINT].")
@click.option("--hardware", help="What it was trained on [this machine].")
def card(checkpoint: Path, report: Path | None, hours: float | None, hardware: str | None) -> None:
    """Write CHECKPOINT's model card, with the scores and pictures of a report.

    The report must be of a bundle exported from this checkpoint. Export again afterwards: a bundle
    takes the card along.
    """
    need_train()
    from gentron.train.card import write_card

    for file in write_card(checkpoint, report, hours=hours, hardware=hardware):
        click.echo(str(file))


def _request(options: dict[str, Any]) -> Request:
    need_train()
    from gentron.cli.score import Request

    return Request(**options)


def main() -> None:
    run_command(cli)
