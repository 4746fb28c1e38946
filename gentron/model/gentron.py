"""GenTron: text projection, conditioner and denoiser, joined for training and as the oracle."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from gentron.config import GenTronConfig
from gentron.model.conditioning import Conditioner, TextProjection
from gentron.model.denoiser import Denoiser

# Names of what `GenTron.initialise` sets to zero.
ZERO_INITIALISED = re.compile(
    r"(adaln\.\d+|conditioner\.shared|(cross|temporal)\.to_out|(conditioner|denoiser)\.final)\."
)
RANDOM_STD = 0.02  # DiT's embeddings


class GenTron(nn.Module):
    """The paper's forward pass: `denoise(latents, condition(t, pooled), project(tokens))`."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        self.text_projection = TextProjection(config)
        self.conditioner = Conditioner(config)
        self.denoiser = Denoiser(config)

    def initialise(self) -> GenTron:
        """adaLN-Zero: a fresh block is the identity, a fresh network predicts zero.

        Zero at the start: gates and their projections, the outputs of cross-attention (so that
        text enters gradually) and of temporal attention (so that a video model fresh from an
        image model draws its frames), and the final linear.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in self.conditioner.embedders():
            nn.init.normal_(embedder.inner.weight, std=RANDOM_STD)
            nn.init.normal_(embedder.outer.weight, std=RANDOM_STD)
        for module in self.zero_initialised():
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        return self

    def zero_initialised(self) -> list[nn.Module]:
        zero: list[nn.Module] = self.conditioner.modulation_layers()
        for block in self.denoiser.blocks:
            zero += [layer.to_out for layer in (block.cross, block.temporal) if layer is not None]
        return [*zero, self.denoiser.final]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        hidden: list[Tensor],
        mask: list[Tensor],
        pooled: Tensor | None = None,
        motion_free: Tensor | None = None,
        size: Tensor | None = None,
        frame_places: Tensor | None = None,
    ) -> Tensor:
        """Prediction for each row: latents [R, F, C, h, w], timesteps [R], texts [R, L_i, W_i],
        size [R, 2], height and width in pixels; frame_places [F] is where the frames stand in
        their clip, 0 to F - 1 unless told."""
        rows = torch.arange(latents.shape[0], device=latents.device)
        modulation, final_modulation = self.conditioner(timesteps, pooled, size)
        tables = [] if self.config.injection == "adaln" else self.text_projection(hidden, mask)
        if self.config.temporal and motion_free is None:
            motion_free = torch.zeros_like(rows, dtype=torch.bool)
        return self.denoiser.predict(
            latents, modulation, final_modulation, rows, None, motion_free, tables, frame_places
        )


def random_values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Seeded stand-in weights with no zero gates, so parity, engine size and timing mean something.

    Norm scales are near 1; biases and whatever training starts at zero are N(0, 0.02); matrices
    are N(0, 1 / fan in). float32.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return values.mul_(RANDOM_STD).add_(1 if name.endswith("weight") else 0)
    if ZERO_INITIALISED.search(name):
        return values.mul_(RANDOM_STD)
    return values.div_(math.sqrt(math.prod(shape[1:])))
