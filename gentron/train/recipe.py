"""`gentron-train emoji`: sprites -> autoencoder -> latent pool -> denoiser, all resumable."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderDC
from PIL import Image, ImageDraw
from torch import Tensor

from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.autoencoder import train_autoencoder
from gentron.train.card import this_machine
from gentron.train.checkpoint import write_checkpoint
from gentron.train.checkpointing import Run
from gentron.train.denoiser import sample_latents, train_denoiser
from gentron.train.pools import LatentPool, build_pool
from gentron.train.scenes import find_font, load_sprites, nouns
from gentron.train.text import FrozenText

log = logging.getLogger(__name__)

# Watched while training and never used to choose anything: nouns of the vocabulary, words that no
# caption holds (puppy, kitty), pairs, sizes.
WATCHED = (
    "a cat reading a newspaper",
    "a red apple",
    "a penguin",
    "a mushroom",
    "a guitar on a red background",
    "a house on a grey background",
    "a dog on a blue background",
    "a puppy",
    "a kitty on a yellow background",
    "a small car on a green background",
    "a huge strawberry",
    "a bicycle",
    "a dog and a cat",
    "an owl on the left, a rocket on the right",
    "an airplane in the sky",
    "a robot on a pink background",
)


@dataclass(frozen=True)
class Recipe:
    """How much of each stage."""

    autoencoder_images: int
    autoencoder_batch: int
    pool_images: int
    denoiser_steps: int
    batch: int
    seed: int = 0


# `full` made the checkpoint that ships; `small` is what two CPU cores do in an afternoon.
RECIPES = {
    "full": Recipe(115_200, 64, 262_144, 2_800, 512),
    "small": Recipe(28_000, 16, 24_576, 3_300, 64),
}
NOTES = "recipe.json"  # the numbers of a folder's image run


class Prepared(NamedTuple):
    """What the denoisers are trained with, all on one device."""

    names: list[str]
    sprites: Tensor
    autoencoder: AutoencoderDC
    pool: LatentPool
    text: FrozenText
    null: tuple[Tensor, Tensor, Tensor]


def prepare(
    folder: Path, recipe: Recipe, *, font: Path | None, device: torch.device, compile: bool
) -> Prepared:
    """Sprites, autoencoder and pool, made or read from `folder`."""
    names = nouns()
    sprites = load_sprites(find_font(font), names).to(device)
    log.info("autoencoder: %d pictures", recipe.autoencoder_images)
    autoencoder = train_autoencoder(
        folder,
        sprites,
        names,
        images=recipe.autoencoder_images,
        batch=recipe.autoencoder_batch,
        seed=recipe.seed,
        compile=compile,
    )
    text = FrozenText(EMOJI.transformer.text[0].max_tokens).to(device)
    log.info("latent pool: %d pictures", recipe.pool_images)
    pool = build_pool(
        folder, autoencoder, sprites, names, text, count=recipe.pool_images, seed=recipe.seed
    )
    return Prepared(names, sprites, autoencoder, pool, text, text([""]))


def train_emoji(
    folder: Path,
    recipe: Recipe,
    *,
    font: Path | None = None,
    device: torch.device | None = None,
    compile: bool = True,
) -> None:
    """Runs whatever the folder does not hold yet. Stop it at any time; call again to go on."""
    device = device or best_device()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTES).write_text(json.dumps(vars(recipe), indent=1) + "\n", "utf-8")
    ready = prepare(folder, recipe, font=font, device=device, compile=compile)
    watched = ready.text(list(WATCHED))

    def snapshot(model: GenTron, step: int) -> None:
        latents = sample_latents(model, watched, ready.null, seed=recipe.seed)
        pictures = decode(ready.autoencoder, latents, ready.pool)
        save_grid(pictures, folder / "grids" / f"{step:06}.png", columns=4)
        save_curve(folder)
        provenance = {
            "recipe": "gentron-train emoji",
            **vars(recipe),
            "denoiser_steps": step,
            "hardware": hardware(device),
        }
        write_checkpoint(
            folder / "checkpoint", model, ready.autoencoder, ready.pool, ready.text,
            provenance=provenance,
        )  # fmt: skip

    log.info("denoiser: %d steps of %d", recipe.denoiser_steps, recipe.batch)
    train_denoiser(
        folder,
        EMOJI.transformer,
        ready.pool,
        ready.null,
        steps=recipe.denoiser_steps,
        batch=recipe.batch,
        seed=recipe.seed,
        compile=compile,
        on_snapshot=snapshot,
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware(device: torch.device) -> str:
    """The GPU's name, or number and name of the processor's cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else this_machine()


@torch.inference_mode()
def decode(autoencoder: torch.nn.Module, latents: Tensor, pool: LatentPool) -> Tensor:
    """Normalised latents [B, C, h, w] -> uint8 pictures [B, 3, H, W]."""
    raw = latents * pool.std[:, None, None] + pool.mean[:, None, None]
    pixels = autoencoder.decode(raw, return_dict=False)[0]
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def save_grid(pictures: Tensor, file: Path, *, columns: int) -> None:
    _, _, height, width = pictures.shape
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        canvas.paste(tile, (index % columns * width, index // columns * height))
    file.parent.mkdir(exist_ok=True)
    canvas.save(file)


def save_curve(folder: Path) -> None:
    """Loss by step as a PNG: enough to see whether it still falls."""
    points = [(row["step"], row["loss"]) for row in Run(folder, "denoiser").history()]
    if len(points) < 2:
        return
    width, height, margin = 640, 320, 40
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    low, high = min(loss for _, loss in points), min(1.2, max(loss for _, loss in points))
    last = points[-1][0]

    def place(step: int, loss: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * step / last
        y = margin + (height - 2 * margin) * (high - min(loss, high)) / max(high - low, 1e-6)
        return x, y

    pen.line([place(*point) for point in points], fill="black", width=2)
    pen.text((margin, 12), f"loss {low:.3f} to {high:.3f}, steps to {last}", fill="black")
    canvas.save(folder / "loss.png")
