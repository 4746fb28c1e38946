"""`gentron-train video`: clips of the image run's sprites, then temporal layers on its model."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gentron.errors import RequestError
from gentron.guidance import guidance_branches
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.checkpoint import write_checkpoint
from gentron.train.checkpointing import Run
from gentron.train.clips import FRAMES
from gentron.train.denoiser import FLOW_TIMESTEPS, IMAGE_RUN, compile_blocks, noise_levels
from gentron.train.hard import hardest, missed
from gentron.train.pools import (
    CHUNK,
    STATISTICS,
    LatentPool,
    build_backwards,
    build_clip_pool,
    build_pool,
)
from gentron.train.precision import mixed
from gentron.train.recipe import (
    NOTES,
    Prepared,
    Recipe,
    best_device,
    decode,
    hardware,
    prepare,
    save_grid,
)
from gentron.train.video import (
    NAME,
    VideoRecipe,
    from_image_model,
    train_video,
    video_config,
)

log = logging.getLogger(__name__)

NOUNS = "nouns.txt"  # of a run: those it shows more often
IMAGES_PER_NOUN = 48  # of these, in a pool of their own

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


# As `recipe.RECIPES`.
VIDEO_RECIPES = {
    "full": VideoRecipe(262_144, 8_192, 1_600, 64, 512),
    "small": VideoRecipe(12_288, 1_024, 3_000, 8, 64),
}


def train_emoji_video(
    folder: Path,
    recipe: VideoRecipe,
    *,
    font: Path | None = None,
    device: torch.device | None = None,
    compile: bool = True,
    name: str = NAME,
    start: str = IMAGE_RUN,
    teacher: str | None = None,
) -> None:
    """Goes on from the run `start` in `folder`, the image run or an earlier one of this kind;
    writes FOLDER/checkpoint-NAME and grids of frames. `teacher` is a run too: the one whose model
    images are learned from.

    Raises RequestError if a run is not there or not finished, or if `name` is one of them.
    """
    if name in (start, teacher):
        raise RequestError("run", f"{name!r} is a run that this one needs; choose another --run")
    device = device or best_device()
    state = _finished(folder, start, device)
    recipe = replace(recipe, lead=recipe.lead_after(state["averaged"]))
    taught = _taught(_finished(folder, teacher, device), compile) if teacher else None
    images = Recipe(**json.loads((folder / NOTES).read_text("utf-8")))
    ready = prepare(
        folder,
        replace(images, pool_images=recipe.pool_images, seed=recipe.seed),
        font=font,
        device=device,
        compile=compile,
    )
    log.info("clips: %d of %d frames", recipe.clips, FRAMES)
    clips = build_clip_pool(folder, ready.autoencoder, ready.sprites, ready.names, ready.text,
                            ready.pool, count=recipe.clips, seed=recipe.seed)  # fmt: skip
    turned = build_backwards(folder, ready.names, ready.text, count=recipe.clips,
                             seed=recipe.seed, device=device)  # fmt: skip
    hard = None
    if recipe.hard_nouns:
        hard = _hard_pool(folder, name, recipe, ready, state["averaged"])
    watched = ready.text(list(WATCHED))

    provenance = {
        "recipe": "gentron-train emoji, gentron-train video",
        **vars(images),
        **{k: v for k, v in state.get("provenance", {}).items() if k != "recipe"},
        **{f"{name}_{key}": value for key, value in vars(recipe).items() if value is not None},
        **({f"{name}_teacher": teacher} if teacher else {}),
        f"{name}_hardware": hardware(device),
    }

    def snapshot(model: GenTron, step: int) -> None:
        latents = sample_clips(model, watched, ready.null, seed=recipe.seed)
        frames = decode(ready.autoencoder, latents.flatten(0, 1), ready.pool)
        save_grid(frames, folder / f"{name}-grids" / f"{step:06}.png", columns=FRAMES)
        write_checkpoint(folder / f"checkpoint-{name}", model, ready.autoencoder, ready.pool,
                         ready.text, provenance={**provenance, f"{name}_steps": step},
                         config=model.config)  # fmt: skip

    log.info("%s: %d steps", name, recipe.steps)
    train_video(
        folder,
        video_config(EMOJI.transformer),
        state["averaged"],
        ready.pool,
        clips,
        turned,
        ready.null,
        recipe,
        teacher=taught,
        hard=hard,
        compile=compile,
        on_snapshot=snapshot,
        name=name,
        provenance=provenance,
    )


def _finished(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    """What a finished run has saved."""
    there = (folder / f"{name}.pt").is_file() and (folder / NOTES).is_file()
    state = Run(folder, name).load(device) if there else None
    if state is None or state["step"] < state["steps"]:
        asked = "no finished image model" if name == IMAGE_RUN else f"no finished run {name!r}"
        again = "emoji" if name == IMAGE_RUN else f"video --run {name}"
        raise RequestError("folder", f"{folder}: {asked}; run: gentron-train {again}")
    return state


def _taught(state: dict[str, Any], compile: bool) -> GenTron:
    """The averaged network of a run, to learn from; an image run's draws every frame for itself."""
    averaged = state["averaged"]
    model = from_image_model(video_config(EMOJI.transformer), averaged)
    model = model.to(next(iter(averaged.values())).device).eval()
    if compile:
        compile_blocks(model)
    return model


def _hard_pool(
    folder: Path, name: str, recipe: VideoRecipe, ready: Prepared, averaged: dict[str, Tensor]
) -> LatentPool:
    """Pictures of the nouns that the model which the run starts from draws worst; they and the
    list of these nouns lie in a folder of the run's."""
    own = folder / f"{name}-hard"
    own.mkdir(exist_ok=True)
    shutil.copyfile(folder / STATISTICS, own / STATISTICS)
    given = ready.autoencoder, ready.sprites, ready.names, ready.text

    def measure() -> Tensor:
        return missed(_taught({"averaged": averaged}, compile=False), *given, ready.pool)

    worst = hardest(own / NOUNS, ready.names, recipe.hard_nouns, measure)
    log.info("hard nouns: %d, see %s", len(worst), own / NOUNS)
    count = -(-len(worst) * IMAGES_PER_NOUN // CHUNK) * CHUNK
    return build_pool(own, *given, count=count, seed=recipe.seed, only=worst)


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
    config, count, device = model.config, len(texts[0]), texts[0].device
    generator = torch.Generator().manual_seed(seed)
    shape = (count, frames, config.latent_channels, config.sample_height, config.sample_width)
    x = torch.randn(shape, generator=generator).to(device)
    branches = guidance_branches(guidance, motion, moving=True)
    for now, then in pairwise(noise_levels(steps)):
        t = (now * FLOW_TIMESTEPS).expand(count).to(device)
        velocity = torch.zeros_like(x)
        for branch in branches:
            chosen = (
                texts
                if branch.text
                else tuple(v.expand_as(p) for v, p in zip(null, texts, strict=True))
            )
            hidden, mask, pooled = chosen
            still = torch.full((count,), not branch.motion, device=device)
            with mixed(device):
                predicted = model(x, t, [hidden], [mask], pooled, still)
            velocity += branch.weight * predicted.float()
        x = x + (then - now) * velocity
    return x
