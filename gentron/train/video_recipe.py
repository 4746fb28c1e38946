"""`gentron-train video`: clips of the image run's sprites, then temporal layers on its model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from gentron.errors import RequestError
from gentron.guidance import guidance_branches
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.autoencoder import train_autoencoder
from gentron.train.checkpoint import write_checkpoint
from gentron.train.checkpointing import Run
from gentron.train.clips import FRAMES
from gentron.train.denoiser import FLOW_TIMESTEPS, build_pool
from gentron.train.recipe import Recipe, decode, save_grid
from gentron.train.scenes import find_font, load_sprites, nouns
from gentron.train.text import FrozenText
from gentron.train.video import MOTION_FREE, build_clip_pool, train_video, video_config

log = logging.getLogger(__name__)

# Watched while training and never used to choose anything.
WATCHED = (
    "an automobile moving right on a sky blue background",
    "a red apple moving left",
    "a rocket moving up",
    "a penguin bouncing on a green background",
    "a mushroom growing",
    "a house rotating on a grey background",
    "a red car moving right",
    "a cat moving down on a yellow background",
)


@dataclass(frozen=True)
class VideoRecipe:
    """How much of each stage, after the image model is trained."""

    clips: int = 3_072
    steps: int = 3_000
    motion_free: float = MOTION_FREE
    seed: int = 0


def train_emoji_video(
    folder: Path,
    recipe: VideoRecipe,
    *,
    font: Path | None = None,
    compile: bool = True,
    name: str = "emoji-video",
) -> None:
    """Goes on from the image run in `folder`; writes FOLDER/checkpoint-video and grids of frames.

    Raises RequestError if there is no finished image model.
    """
    images, names = Recipe(seed=recipe.seed), nouns()
    there = (folder / "denoiser.pt").is_file()
    state = Run(folder, "denoiser").load() if there else None
    if state is None or state["step"] < state["steps"]:
        raise RequestError("folder", f"{folder}: no finished image model; run: gentron-train emoji")
    sprites = load_sprites(find_font(font), names)
    autoencoder = train_autoencoder(
        folder, sprites, names, images=images.autoencoder_images, seed=images.seed, compile=compile
    )
    text = FrozenText(EMOJI.transformer.text[0].max_tokens)
    pool = build_pool(folder, autoencoder, sprites, names, text, count=images.pool_images,
                      seed=images.seed)  # fmt: skip
    log.info("clips: %d of %d frames", recipe.clips, FRAMES)
    clips = build_clip_pool(folder, autoencoder, sprites, names, text, pool, count=recipe.clips,
                            seed=recipe.seed)  # fmt: skip
    null, watched = text([""]), text(list(WATCHED))

    def snapshot(model: GenTron, step: int) -> None:
        latents = sample_clips(model, watched, null, seed=recipe.seed)
        frames = decode(autoencoder, latents.flatten(0, 1), pool)
        save_grid(frames, folder / "video-grids" / f"{step:06}.png", columns=FRAMES)
        provenance = {
            "recipe": "gentron-train video",
            "image_steps": state["step"],
            "clips": recipe.clips,
            "video_steps": step,
            "motion_free": recipe.motion_free,
            "seed": recipe.seed,
        }
        write_checkpoint(folder / "checkpoint-video", model, autoencoder, pool, text,
                         provenance=provenance, config=model.config, name=name)  # fmt: skip

    log.info("video: %d steps", recipe.steps)
    train_video(
        folder,
        video_config(EMOJI.transformer),
        state["averaged"],
        pool,
        clips,
        null,
        steps=recipe.steps,
        motion_free=recipe.motion_free,
        seed=recipe.seed,
        compile=compile,
        on_snapshot=snapshot,
    )


@torch.inference_mode()
def sample_clips(
    model: GenTron,
    texts: tuple[Tensor, Tensor, Tensor],
    null: tuple[Tensor, Tensor, Tensor],
    *,
    frames: int = FRAMES,
    steps: int = 20,
    guidance: float = 4.0,
    motion: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Euler with equation 6 in plain torch, to watch training: [U, F, C, h, w]."""
    config, count = model.config, len(texts[0])
    generator = torch.Generator().manual_seed(seed)
    shape = (count, frames, config.latent_channels, config.sample_height, config.sample_width)
    x = torch.randn(shape, generator=generator)
    branches = guidance_branches(guidance, motion, moving=True)
    for now, then in pairwise(torch.linspace(1, 0, steps + 1)):
        t = (now * FLOW_TIMESTEPS).expand(count)
        velocity = torch.zeros_like(x)
        for branch in branches:
            chosen = (
                texts
                if branch.text
                else tuple(v.expand_as(p) for v, p in zip(null, texts, strict=True))
            )
            hidden, mask, pooled = chosen
            still = torch.full((count,), not branch.motion)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predicted = model(x, t, [hidden], [mask], pooled, still)
            velocity += branch.weight * predicted.float()
        x = x + (then - now) * velocity
    return x
