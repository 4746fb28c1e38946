"""The emoji autoencoder: a small `AutoencoderDC` from diffusers, 128x128 pixels to 16x16 latents.

Residual space-to-channel shortcuts make it learn colour within a few thousand pictures, where a
group-normalised `AutoencoderKL` of the same size did not. Halved latents must decode to the halved
picture as well: without that term the latents' spectrum is flat up to the highest frequency, which
costs the denoiser most of its steps (Skorokhodov et al. 2025, arXiv 2502.14831).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from gentron.train.checkpointing import Run
from gentron.train.precision import mixed
from gentron.train.scenes import SceneSampler, draw

LATENT_CHANNELS = 8
LATENT_NOISE = 0.1  # added while decoding in training, so that the decoder forgives the denoiser
HALVED_WEIGHT = 0.5


def new_autoencoder() -> AutoencoderDC:
    channels, layers, none = (32, 64, 128, 128), (0, 1, 2, 2), ((), (), (), ())
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=32,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of pixels, of 4x4 and 16x16 averages (level and colour) and of gradients (edges)."""
    loss = F.l1_loss(output, target)
    for window in (4, 16):
        loss = loss + F.l1_loss(F.avg_pool2d(output, window), F.avg_pool2d(target, window))
    for axis in (-1, -2):
        loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Decibels for pictures in [-1, 1]: peak-to-peak 2."""
    return float(10 * torch.log10(4 / F.mse_loss(output.clamp(-1, 1), target)))


def train_autoencoder(
    folder: Path,
    sprites: torch.Tensor,
    names: list[str],
    *,
    images: int,
    batch: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    compile: bool = True,
) -> AutoencoderDC:
    """Trains, or resumes, until `images` pictures were seen; the rate decays linearly to zero.

    On the device of the sprites.
    """
    run, device = Run(folder, "autoencoder"), sprites.device
    torch.manual_seed(seed)
    model = new_autoencoder().to(device, memory_format=memory_format(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    sampler = SceneSampler(names, seed)
    step, total = 0, images // batch
    if saved := run.load(device):
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    # A GPU runs these large convolutions as fast without, and compiling takes a minute.
    forward = torch.compile(_forward) if compile and device.type == "cpu" else _forward
    started, first = time.monotonic(), step
    while step < total:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / total)
        # Seeded per step, so that a resumed run sees what an uninterrupted one would have seen.
        sampler.reseed(f"autoencoder {seed} {step}")
        torch.manual_seed(seed * 1_000_003 + step)
        pictures = draw(sampler.sample(batch), sprites)
        pictures = pictures.contiguous(memory_format=memory_format(device))
        with mixed(device):
            output, halved, latents = forward(model, pictures)
        loss = reconstruction_loss(output.float(), pictures)
        total_loss = (
            loss
            + HALVED_WEIGHT * reconstruction_loss(halved.float(), F.avg_pool2d(pictures, 2))
            + 1e-3 * latents.float().square().mean()
        )
        optimizer.zero_grad(set_to_none=True)
        total_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 or step == total:
            speed = (step - first) * batch / (time.monotonic() - started)
            run.log(
                step=step,
                loss=round(loss.item(), 4),
                psnr=round(psnr(output.float().detach(), pictures), 2),
                images_per_second=round(speed, 1),
            )
        if run.due() or step == total:
            run.save(_state(model, optimizer, step))
    return model.eval()


def memory_format(device: torch.device) -> torch.memory_format:
    """Convolutions of a GPU's tensor cores read channels last; a CPU is faster with them first."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _forward(model: Any, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> what the latents decode to, what their 2x2 averages decode to, the latents."""
    latents = model.encode(pictures, return_dict=False)[0]
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    halved = F.avg_pool2d(noisy, 2)
    decoded = (model.decode(z, return_dict=False)[0] for z in (noisy, halved))
    return *decoded, latents


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
