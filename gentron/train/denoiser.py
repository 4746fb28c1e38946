"""The emoji denoiser: velocity prediction on the straight path, classifier-free text dropout."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.schedule import NoiseSchedule
from gentron.solvers import solver_table
from gentron.train.checkpointing import Run
from gentron.train.pools import LatentPool, captions
from gentron.train.precision import mixed

TEXT_DROPOUT = 0.1  # DiT, PixArt
FLOW_TIMESTEPS = 1000  # the network reads t in 0..1000
IMAGE_RUN = "denoiser"
HELD = f"{IMAGE_RUN}-held"  # the state before the rate falls


def compile_blocks(model: GenTron) -> None:
    """Compiles the block that all blocks are, in place: a tenth of the whole network's time."""
    for block in model.denoiser.blocks:
        block.compile()


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

    `on_snapshot(averaged, step)` is called every `snapshot_every` seconds and at the end. All on
    the device of the pool.
    """
    run, device = Run(folder, IMAGE_RUN), pool.latents.device
    torch.manual_seed(seed)
    model = GenTron(config).initialise().to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    step = 0
    saved = run.load(device)
    if saved and saved["step"] > last_held(saved["steps"]) and saved["steps"] != steps:
        # The rate has fallen towards another end: go on from where it began to.
        saved = Run(folder, HELD).load(device)
        run.forget(after=saved["step"] if saved else 0)
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
    if compile:
        compile_blocks(model)
    snapshot_at = started = time.monotonic()
    first, window = step, []
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        loss = flow_loss(model, pool, null, batch, seed * 1_000_003 + step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        window.append(loss.detach())  # read later: a GPU is not waited for at every step
        step += 1
        if step % 50 == 0 or step == steps:
            rate = (time.monotonic() - started) / (step - first)
            mean_loss = float(torch.stack(window).mean())
            run.log(step=step, loss=round(mean_loss, 4), seconds_per_step=round(rate, 4))
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
    times: tuple[float, float] = (0.0, 1.0),
    teacher: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Squared error of the velocity `noise - x0`, or of a teacher's, at `x_t = (1 - t) x0 + t
    noise`; t is the sigmoid of a normal variable with mean and deviation `times`.

    The mean of the velocities that data give for one x_t is what a network learns. Single ones lie
    far around it, a teacher's is its estimate, so there is far less noise in the gradient.
    """
    device = pool.latents.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randint(len(pool.latents), (batch,), generator=generator, device=device)
    clean = pool.latents[rows].float()
    t = sigmoid_normal(batch, times, generator)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    noisy = torch.lerp(clean, noise, t[:, None, None, None])
    drop = torch.rand(batch, generator=generator, device=device) < TEXT_DROPOUT
    hidden, mask, pooled = captions(pool, rows, drop, null, generator)
    given = noisy[:, None], t * FLOW_TIMESTEPS, [hidden], [mask], pooled
    with mixed(device):
        velocity = forward(*given)[:, 0].float()
        if teacher is None:
            return F.mse_loss(velocity, noise - clean)
        with torch.no_grad():
            taught = teacher(*given)[:, 0].float()
    return F.mse_loss(velocity, taught)


def sigmoid_normal(count: int, times: tuple[float, float], generator: torch.Generator) -> Tensor:
    """[count] in 0 to 1; `times` are the normal variable's mean and deviation."""
    mean, deviation = times
    drawn = torch.randn(count, generator=generator, device=generator.device)
    return (mean + deviation * drawn).sigmoid()


def noise_levels(steps: int) -> Tensor:
    """Those that the packaged model walks through, from 1 to 0: float32 [steps + 1]."""
    schedule = NoiseSchedule.from_config(EMOJI.scheduler)
    levels = schedule.sigmas(solver_table("euler", schedule, steps).timesteps)
    return torch.tensor([*levels, 0.0], dtype=torch.float32)


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
    config, count, device = model.config, len(texts[0]), texts[0].device
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, config.latent_channels, config.sample_height, config.sample_width)
    x = torch.randn(shape, generator=generator).to(device)
    hidden, mask, pooled = (
        torch.cat([text, empty.expand_as(text)]) for text, empty in zip(texts, null, strict=True)
    )
    for now, then in pairwise(noise_levels(steps)):
        t = (now * FLOW_TIMESTEPS).expand(2 * count).to(device)
        with mixed(device):
            velocity = model(torch.cat([x, x]), t, [hidden], [mask], pooled)
        conditional, unconditional = velocity.float().chunk(2)
        x = x + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return x[:, 0]
