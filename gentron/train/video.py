"""The emoji video model: the image model with temporal attention, trained on images and clips.

Images and clips take turns. A share of the clips' rows is motion-free: their frames see only
themselves (section 3.3.2), so that the network without motion stays in the network with it. Text is
dropped by a lot of its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.train.checkpointing import Run
from gentron.train.clips import FRAMES
from gentron.train.denoiser import (
    FLOW_TIMESTEPS,
    TEXT_DROPOUT,
    compile_blocks,
    flow_loss,
    sigmoid_normal,
)
from gentron.train.pools import ClipPool, LatentPool, captions

MOTION_FREE = 0.15  # between the 0.1 and 0.2 that section 3.3.2 gives
NAME = "video"
# Mean and deviation of the normal variables whose sigmoids are the times of clips and of images. A
# caption counts where the noise hides what it says, and the more numbers there are, the less a
# given noise hides: the 16,384 of a clip stand out of it up to about t = 0.99, where sampling takes
# its first step. What trains below that may learn to read the direction off the noise instead.
CLIP_TIMES = (2.5, 1.5)
IMAGE_TIMES = (0.8, 1.2)


def video_config(image: GenTronConfig, *, frames: int = FRAMES, most: int = 16) -> GenTronConfig:
    """The image model's configuration with temporal layers, for up to `most` frames."""
    return replace(image, temporal=True, frame_values=True, sample_frames=frames, max_frames=most)


def from_image_model(config: GenTronConfig, image: dict[str, Tensor]) -> GenTron:
    """A video model that draws the image model's frames: its temporal outputs are zero. From a
    video model's tensors, that video model.

    Raises KeyError for a tensor that the image model lacks and that is not temporal.
    """
    model = GenTron(config).initialise()
    state = model.state_dict()
    for name in state:
        if ".temporal." not in name or name in image:
            state[name] = image[name]
    model.load_state_dict(state)
    return model


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
    hidden, mask, pooled = captions(pool, rows, drop, null)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        velocity = forward(noisy, t * FLOW_TIMESTEPS, [hidden], [mask], pooled, still)
    return F.mse_loss(velocity.float(), noise - clean)


def train_video(
    folder: Path,
    config: GenTronConfig,
    start: dict[str, Tensor],
    images: LatentPool,
    clips: ClipPool,
    null: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    image_batch: int = 64,
    clip_batch: int = 8,
    image_share: float = 0.4,
    motion_free: float = MOTION_FREE,
    peak_rate: float = 5e-4,
    ema_decay: float = 0.998,
    seed: int = 0,
    compile: bool = True,
    on_snapshot: Callable[[GenTron, int], None] = lambda model, step: None,
    snapshot_every: float = 600.0,
    name: str = NAME,
) -> GenTron:
    """Trains, or resumes, for `steps` in all; returns the averaged (EMA) network.

    `name` is that of the run's files in `folder`. `start` is the state of the model that it
    starts from. Every step is an image batch with probability `image_share`, else a batch of clips.
    """
    run, device = Run(folder, name), images.latents.device
    torch.manual_seed(seed)
    model = from_image_model(config, start).to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    step = 0
    if saved := run.load(device):
        step = saved["step"]
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
    if compile:
        compile_blocks(model)
    snapshot_at = started = time.monotonic()
    first, windows = step, ([], [])
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, peak_rate)
        turn = torch.Generator().manual_seed(seed * 7_000_003 + step)
        is_image = float(torch.rand((), generator=turn)) < image_share
        lot = seed * 1_000_003 + step
        if is_image:
            loss = flow_loss(model, images, null, image_batch, lot, IMAGE_TIMES)
        else:
            loss = clip_loss(model, clips, null, clip_batch, motion_free, lot)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        windows[is_image].append(loss.detach())
        step += 1
        if step % 50 == 0 or step == steps:
            rate = (time.monotonic() - started) / (step - first)
            clip_mean, image_mean = (_mean(window) for window in windows)
            run.log(step=step, loss=clip_mean, image_loss=image_mean,
                    seconds_per_step=round(rate, 4))  # fmt: skip
            for window in windows:
                window.clear()
        if run.due() or step == steps:
            run.save(
                {
                    "step": step,
                    "steps": steps,
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )
        if time.monotonic() - snapshot_at > snapshot_every or step == steps:
            on_snapshot(averaged, step)
            snapshot_at = time.monotonic()
    return averaged.eval()


def _mean(losses: list[Tensor]) -> float | None:
    return round(float(torch.stack(losses).mean()), 4) if losses else None


def _rate(step: int, total: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall linearly to 3 % over the last half."""
    warm = min(1.0, (step + 1) / 100)
    left = (total - step) / (total / 2)
    return peak * warm * max(0.03, min(1.0, left))
