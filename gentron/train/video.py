"""The emoji video model: the image model with temporal attention, trained on images and clips.

Images and clips take turns. A share of the clips' rows is motion-free: their frames see only
themselves (section 3.3.2), so that the network without motion stays in the network with it. Text is
dropped by a lot of its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.errors import RequestError
from gentron.model import GenTron
from gentron.model.denoiser import frame_code
from gentron.train.checkpointing import Run
from gentron.train.clips import FRAMES
from gentron.train.denoiser import (
    FLOW_TIMESTEPS,
    TEXT_DROPOUT,
    compile_blocks,
    flow_loss,
    sigmoid_normal,
)
from gentron.train.optimizers import MUON, optimizers, step_all
from gentron.train.pools import (
    Backwards,
    ClipPool,
    LatentPool,
    captions,
    longest,
    without_padding,
)
from gentron.train.precision import mixed

MOTION_FREE = 0.15  # between the 0.1 and 0.2 that section 3.3.2 gives
NAME = "video"
EMA_DECAY = 0.998
# Mean and deviation of the normal variables whose sigmoids are the times of clips and of images. A
# caption counts where the noise hides what it says, and the more numbers there are, the less a
# given noise hides: the 16,384 of a clip stand out of it up to about t = 0.99, where sampling takes
# its first step. What trains below that may learn to read the direction off the noise instead.
CLIP_TIMES = (2.5, 1.5)
IMAGE_TIMES = (1.2, 1.2)
# Of images learned from a teacher: what lies between two networks is a tenth of what lies between a
# network and the data, and would be lost in the noise of the clips' gradients.
TEACHER_WEIGHT = 4.0
# Of the images in a step, where a recipe has hard nouns: these show nothing else, and are learned
# from the data, since what a teacher says of them is what is wrong.
HARD_SHARE = 0.5
# The lead: what comes before whole clips are shown. Motion is a frame's place times a word of the
# caption, a product of two signals that are worthless alone, so a network that hardly hears its
# frame codes finds nothing to follow. The codes get room in the tokens first, and what is shown
# differs as much as it can: the two ends of a clip, and the same clip backwards.
LEAD = 300
LEAD_TIMES = (4.0, 1.0)
LEAD_RATE = 1e-3
LEAD_BATCH = 8  # clips, and each of them backwards
CODE_BLOCKS = slice(0, 3, 2)
CODE_DIRECTIONS = 5  # those in which the codes of 8 frames differ
# Where `caption_gap` compares: sampling is about to decide where things go.
GAP_TIME = 0.98


@dataclass(frozen=True)
class VideoRecipe:
    """How much of each stage, after the image model is trained."""

    pool_images: int
    clips: int
    steps: int
    clip_batch: int
    image_batch: int
    image_share: float = 0.4  # of the steps; the others see clips
    motion_free: float = MOTION_FREE
    rate: float = 5e-4  # the learning rate while it is held
    lead: int | None = None  # steps before clips are shown, see `ends_loss`
    optimizer: str = MUON  # of `optimizers.OPTIMIZERS`
    hard_nouns: int | None = None  # shown by a share of the images, see `HARD_SHARE`
    seed: int = 0

    def lead_after(self, tensors: Mapping[str, Tensor]) -> int:
        """`lead`, or what a model with these tensors needs: none if it is a video model already."""
        if self.lead is not None:
            return self.lead
        return 0 if any(map(is_temporal, tensors)) else LEAD


def video_config(image: GenTronConfig, *, frames: int = FRAMES, most: int = 16) -> GenTronConfig:
    """The image model's configuration with temporal layers, for up to `most` frames."""
    return replace(image, temporal=True, frame_values=True, sample_frames=frames, max_frames=most)


def is_temporal(name: str) -> bool:
    """Whether the tensor of this name is one that an image model lacks."""
    return ".temporal." in name


def from_image_model(config: GenTronConfig, image: dict[str, Tensor]) -> GenTron:
    """A video model that draws the image model's frames: its temporal outputs are zero. From a
    video model's tensors, that video model.

    Raises KeyError for a tensor that the image model lacks and that is not temporal.
    """
    model = GenTron(config).initialise()
    state = model.state_dict()
    for name in state:
        if not is_temporal(name) or name in image:
            state[name] = image[name]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def make_room_for_frame_codes(model: GenTron, frames: int, seed: int) -> None:
    """Lets the frame codes into the tokens of `CODE_BLOCKS` at their full size, in place: a few
    value channels read the directions in which the codes differ, and the output passes them on
    along directions drawn by lot."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.width
    codes = frame_code(torch.arange(frames), width)[:, 0]
    count = min(CODE_DIRECTIONS, frames - 1)
    directions = torch.linalg.svd(codes - codes.mean(0), full_matrices=False).Vh[:count]
    for block in model.denoiser.blocks[CODE_BLOCKS]:
        temporal = block.temporal
        onto = torch.linalg.qr(torch.randn(width, count, generator=generator)).Q
        temporal.to_v.weight[:count] = directions.to(temporal.to_v.weight)
        temporal.to_v.bias[:count] = 0
        temporal.to_out.weight[:, :count] = onto.to(temporal.to_out.weight)


def ends_loss(
    forward: Callable[..., Tensor],
    pool: ClipPool,
    turned: Backwards,
    batch: int,
    seed: int,
) -> Tensor:
    """`flow_loss` of the first and the last frame of clips, and of the same clips backwards.

    A clip and its opposite get the same time and noise, so that what the two have in common cancels
    and what is left is the word that tells them apart. Nothing is dropped.
    """
    device = pool.latents.device
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.randint(len(turned.rows), (batch,), generator=generator, device=device)
    rows = turned.rows[chosen]
    last = pool.latents.shape[1] - 1
    ends = pool.latents[rows][:, [0, last]].float()  # [R, 2, C, h, w]
    t = sigmoid_normal(batch, LEAD_TIMES, generator).repeat(2)
    noise = torch.randn(ends.shape, generator=generator, device=device).repeat(2, 1, 1, 1, 1)
    clean = torch.cat([ends, ends.flip(1)])
    noisy = torch.lerp(clean, noise, t[:, None, None, None, None])
    hidden = torch.cat([pool.hidden[rows], turned.hidden[chosen]]).float()
    mask = torch.cat([pool.mask[rows], turned.mask[chosen]])
    pooled = torch.cat([pool.pooled[rows], turned.pooled[chosen]]).float()
    places = torch.tensor([0, last], device=device)
    with mixed(device):
        velocity = forward(noisy, t * FLOW_TIMESTEPS, [hidden], [mask], pooled, frame_places=places)
    return F.mse_loss(velocity.float(), noise - clean)


@torch.no_grad()
def caption_gap(
    forward: Callable[..., Tensor], pool: ClipPool, turned: Backwards, count: int = 16
) -> float:
    """By what share the loss of clips is larger with the caption of the opposite motion, where
    sampling begins; 0 for a network that draws no direction from its captions."""
    device = pool.latents.device
    rows, count = turned.rows[:count], min(count, len(turned.rows))
    clean = pool.latents[rows].float()
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    t = torch.full((count,), GAP_TIME, device=device)
    losses = []
    for texts, of in ((pool, rows), (turned, torch.arange(count, device=device))):
        hidden, mask, pooled = texts.hidden[of].float(), texts.mask[of], texts.pooled[of].float()
        with mixed(device):
            velocity = forward(
                torch.lerp(clean, noise, GAP_TIME), t * FLOW_TIMESTEPS, [hidden], [mask], pooled
            )
        losses.append(F.mse_loss(velocity.float(), noise - clean))
    return round(float(losses[1] / losses[0]) - 1, 4)


def clip_loss(
    forward: Callable[..., Tensor],
    pool: ClipPool,
    null: tuple[Tensor, Tensor, Tensor],
    batch: int,
    motion_free: float,
    seed: int,
) -> Tensor:
    """`flow_loss` of clips: one time for all frames of a clip, noise of its own for each.

    Text and motion are dropped independently, as equation 6 needs its three networks.
    """
    device = pool.latents.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randint(len(pool.latents), (batch,), generator=generator, device=device)
    clean = pool.latents[rows].float()  # [R, F, C, h, w]
    t = sigmoid_normal(batch, CLIP_TIMES, generator)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    noisy = torch.lerp(clean, noise, t[:, None, None, None, None])
    drop = torch.rand(batch, generator=generator, device=device) < TEXT_DROPOUT
    still = torch.rand(batch, generator=generator, device=device) < motion_free
    hidden, mask, pooled = captions(pool, rows, drop, null, generator)
    with mixed(device):
        velocity = forward(noisy, t * FLOW_TIMESTEPS, [hidden], [mask], pooled, still)
    return F.mse_loss(velocity.float(), noise - clean)


def train_video(
    folder: Path,
    config: GenTronConfig,
    start: dict[str, Tensor],
    images: LatentPool,
    clips: ClipPool,
    turned: Backwards,
    null: tuple[Tensor, Tensor, Tensor],
    recipe: VideoRecipe,
    *,
    teacher: Callable[..., Tensor] | None = None,
    hard: LatentPool | None = None,
    compile: bool = True,
    on_snapshot: Callable[[GenTron, int], None] = lambda model, step: None,
    snapshot_every: float = 600.0,
    name: str = NAME,
    provenance: Mapping[str, Any] | None = None,
) -> GenTron:
    """Trains, or resumes, as `recipe` says; returns the averaged (EMA) network.

    `name` is that of the run's files in `folder`. `start` is the state of the model that it
    starts from. With a teacher, called as the model is, images are learned from what it says and
    not from the data; `HARD_SHARE` of them are those of the pool `hard`, learned from the data all
    the same. The lead's steps are `ends_loss`; then every step is an image batch with
    probability `image_share`, else a batch of clips. The log has `caption_gap` and the losses
    since the line before; with a teacher, that of images is the squared distance from it. That
    of hard ones stands beside it. The state keeps `provenance`, for the runs that go on from it.

    Raises RequestError for a run that was begun with another optimizer.
    """
    run, device = Run(folder, name), images.latents.device
    steps, seed, lead = recipe.steps, recipe.seed, recipe.lead_after(start)
    torch.manual_seed(seed)
    model = from_image_model(config, start)
    if lead:
        make_room_for_frame_codes(model, clips.latents.shape[1], seed)
    model = model.to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    movers = optimizers(model, recipe.optimizer)
    step = 0
    if saved := run.load(device):
        step = _restore(saved, model, averaged, movers, recipe.optimizer)
    if compile:
        compile_blocks(model)
    snapshot_at = started = time.monotonic()
    first = step
    # Most captions are short, and padding costs as much as tokens do.
    tokens = longest(images, hard, clips, turned)
    clips, turned = without_padding(clips, tokens), without_padding(turned, tokens)
    hard = without_padding(hard, tokens) if hard else None
    pools = without_padding(images, tokens), hard, clips, turned
    null = null[0][:, :tokens], null[1][:, :tokens], null[2]
    weights = {"loss": 1.0, "image_loss": TEACHER_WEIGHT if teacher else 1.0}
    if hard:
        weights["image_loss"] *= 1 - HARD_SHARE
        weights["hard_loss"] = HARD_SHARE
    windows: dict[str, list[Tensor]] = {kind: [] for kind in weights}
    while step < steps:
        losses = _losses(model, step, recipe, lead, pools, null, teacher)
        model.zero_grad(set_to_none=True)
        torch.stack([weights[kind] * loss for kind, loss in losses.items()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_all(movers, _rate(step, steps, recipe.rate, lead))
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        for kind, loss in losses.items():
            windows[kind].append(loss.detach())
        step += 1
        if step % 50 == 0 or step == steps:
            rate = (time.monotonic() - started) / (step - first)
            means = {kind: _mean(window) for kind, window in windows.items()}
            gap = caption_gap(averaged, clips, turned)
            run.log(step=step, **means, caption_gap=gap, seconds_per_step=round(rate, 4))
            for window in windows.values():
                window.clear()
        if run.due() or step == steps:
            run.save(
                {
                    "step": step,
                    "steps": steps,
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimizers": [mover.state_dict() for mover in movers],
                    "provenance": dict(provenance or {}),
                }
            )
        if time.monotonic() - snapshot_at > snapshot_every or step == steps:
            on_snapshot(averaged, step)
            snapshot_at = time.monotonic()
    return averaged.eval()


def _restore(
    saved: Mapping[str, Any],
    model: GenTron,
    averaged: GenTron,
    movers: Sequence[torch.optim.Optimizer],
    kind: str,
) -> int:
    """The step at which the run had stopped; raises RequestError if it had other optimizers, or
    none, as an unpacked run."""
    if len(saved.get("optimizers", ())) != len(movers):
        raise RequestError(
            "optimizer", f"the run was not begun with {kind} by this version; go on with the "
            "--optimizer that it began with, or choose another --run"
        )  # fmt: skip
    model.load_state_dict(saved["model"])
    averaged.load_state_dict(saved["averaged"])
    for mover, state in zip(movers, saved["optimizers"], strict=True):
        mover.load_state_dict(state)
    return int(saved["step"])


def _losses(
    model: GenTron,
    step: int,
    recipe: VideoRecipe,
    lead: int,
    pools: tuple[LatentPool, LatentPool | None, ClipPool, Backwards],
    null: tuple[Tensor, Tensor, Tensor],
    teacher: Callable[..., Tensor] | None,
) -> dict[str, Tensor]:
    """What this step is learned from, by the names of the log: clips, or images and hard ones."""
    images, hard, clips, turned = pools
    lot = recipe.seed * 1_000_003 + step
    if step < lead:
        return {"loss": ends_loss(model, clips, turned, LEAD_BATCH, lot)}
    turn = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
    if float(torch.rand((), generator=turn)) >= recipe.image_share:
        return {"loss": clip_loss(model, clips, null, recipe.clip_batch, recipe.motion_free, lot)}
    if hard is None:
        batch = recipe.image_batch
        return {"image_loss": flow_loss(model, images, null, batch, lot, IMAGE_TIMES, teacher)}
    count = max(1, round(recipe.image_batch * HARD_SHARE))
    rest = max(1, recipe.image_batch - count)
    return {
        "image_loss": flow_loss(model, images, null, rest, lot, IMAGE_TIMES, teacher),
        "hard_loss": flow_loss(model, hard, null, count, lot, IMAGE_TIMES),
    }


def _mean(losses: list[Tensor]) -> float | None:
    return round(float(torch.stack(losses).mean()), 4) if losses else None


def _rate(step: int, total: int, peak: float, lead: int) -> float:
    """Warm up over 50 steps, hold, then fall linearly to 3 % over the last half; of its own in
    the lead."""
    warm = min(1.0, (step + 1) / 50)
    if step < lead:
        return LEAD_RATE * warm
    left = (total - step) / (total / 2)
    return peak * warm * max(0.03, min(1.0, left))
