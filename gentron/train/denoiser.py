"""The emoji denoiser: velocity prediction on the straight path, classifier-free text dropout."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.train.checkpointing import Run
from gentron.train.scenes import SceneSampler, draw
from gentron.train.text import FrozenText

TEXT_DROPOUT = 0.1  # DiT, PixArt
FLOW_TIMESTEPS = 1000  # the network reads t in 0..1000
CHUNK = 512
HELD = "denoiser-held"  # the state before the rate falls


@dataclass(frozen=True)
class LatentPool:
    """Encoded pictures and captions: drawn once, since encoding costs more than a training step."""

    latents: Tensor  # [K, C, h, w] float16, normalised per channel
    mean: Tensor  # [C]
    std: Tensor  # [C]
    hidden: Tensor  # [K, L, W] float16
    mask: Tensor  # [K, L] int64
    pooled: Tensor  # [K, W] float16


@torch.inference_mode()
def build_pool(
    folder: Path,
    autoencoder: torch.nn.Module,
    sprites: Tensor,
    names: list[str],
    text: FrozenText,
    *,
    count: int,
    seed: int,
) -> LatentPool:
    """Draws and encodes `count` scenes in chunks, each saved, so that a stop loses one chunk."""
    chunks = []
    for index in range(count // CHUNK):
        file = folder / "pool" / f"{index:04}.pt"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            sampler = SceneSampler(names, seed)
            sampler.random.seed(f"pool {seed} {index}")
            scenes = sampler.sample(CHUNK)
            latents = []
            for start in range(0, CHUNK, 32):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    pictures = draw(scenes[start : start + 32], sprites)
                    latents.append(autoencoder.encode(pictures, return_dict=False)[0].float())
            hidden, mask, pooled = text([scene.caption for scene in scenes])
            chunk = {
                "latents": torch.cat(latents),
                "hidden": hidden.half(),
                "mask": mask,
                "pooled": pooled.half(),
            }
            torch.save(chunk, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        chunks.append(torch.load(file, weights_only=True))
    joined = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    raw = joined.pop("latents")
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    normalised = (raw - mean[:, None, None]) / std[:, None, None]
    return LatentPool(latents=normalised.half(), mean=mean, std=std, **joined)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm up over 200 steps, hold, then fall linearly to 3 % over the last 40 %."""
    warm = min(1.0, (step + 1) / 200)
    left = (total - step) / (total - last_held(total))
    return peak * warm * max(0.03, min(1.0, left))


def last_held(total: int) -> int:
    """The step from which the rate falls. Up to it, a longer training is the same training."""
    return total * 3 // 5


def train_denoiser(
    folder: Path,
    config: GenTronConfig,
    pool: LatentPool,
    null: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch: int = 64,
    peak_rate: float = 1e-3,
    ema_decay: float = 0.999,
    seed: int = 0,
    compile: bool = True,
    on_snapshot: Callable[[GenTron, int], None] = lambda model, step: None,
    snapshot_every: float = 600.0,
) -> GenTron:
    """Trains, or resumes, for `steps` in all; returns the averaged (EMA) network.

    A finished training can be made longer: more `steps` go on from before the rate fell.

    `on_snapshot(averaged, step)` is called every `snapshot_every` seconds and at the end.
    """
    run = Run(folder, "denoiser")
    torch.manual_seed(seed)
    model = GenTron(config).initialise()
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    step = 0
    saved = run.load()
    if saved and saved["step"] > last_held(saved["steps"]) and saved["steps"] != steps:
        # The rate has fallen towards another end: go on from where it began to.
        saved = Run(folder, HELD).load()
        run.forget(after=saved["step"] if saved else 0)
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
    forward = torch.compile(model) if compile else model
    snapshot_at = started = time.monotonic()
    first, window = step, []
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        loss = flow_loss(forward, pool, null, batch, seed * 1_000_003 + step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        window.append(loss.item())
        step += 1
        if step % 50 == 0 or step == steps:
            rate = (time.monotonic() - started) / (step - first)
            mean_loss = sum(window) / len(window)
            run.log(step=step, loss=round(mean_loss, 4), seconds_per_step=round(rate, 3))
            window.clear()
        if run.due() or step in (steps, last_held(steps)):
            state = {
                "step": step,
                "steps": steps,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            run.save(state)
            if step == last_held(steps):
                Run(folder, HELD).save(state)
        if time.monotonic() - snapshot_at > snapshot_every or step == steps:
            on_snapshot(averaged, step)
            snapshot_at = time.monotonic()
    return averaged.eval()


def flow_loss(
    forward: Callable[..., Tensor],
    pool: LatentPool,
    null: tuple[Tensor, Tensor, Tensor],
    batch: int,
    seed: int,
) -> Tensor:
    """Squared error of the velocity `noise - x0` at `x_t = (1 - t) x0 + t noise`; t is the sigmoid
    of a normal."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(pool.latents), (batch,), generator=generator)
    clean = pool.latents[rows].float()
    t = torch.randn(batch, generator=generator).sigmoid()
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, t[:, None, None, None])
    drop = torch.rand(batch, generator=generator) < TEXT_DROPOUT
    hidden, mask, pooled = pool.hidden[rows].float(), pool.mask[rows], pool.pooled[rows].float()
    hidden[drop], mask[drop], pooled[drop] = (value[0] for value in null)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = forward(noisy[:, None], t * FLOW_TIMESTEPS, [hidden], [mask], pooled)
    return F.mse_loss(velocity[:, 0].float(), noise - clean)


@torch.inference_mode()
def sample_latents(
    model: GenTron,
    texts: tuple[Tensor, Tensor, Tensor],
    null: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
) -> Tensor:
    """Euler with classifier-free guidance in plain torch, to watch training: [U, C, h, w]."""
    config, count = model.config, len(texts[0])
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, config.latent_channels, config.sample_height, config.sample_width)
    x = torch.randn(shape, generator=generator)
    hidden, mask, pooled = (
        torch.cat([text, empty.expand_as(text)]) for text, empty in zip(texts, null, strict=True)
    )
    times = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(times):
        t = (now * FLOW_TIMESTEPS).expand(2 * count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = model(torch.cat([x, x]), t, [hidden], [mask], pooled)
        conditional, unconditional = velocity.float().chunk(2)
        x = x + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return x[:, 0]
