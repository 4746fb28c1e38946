"""Small networks with seeded weights that are nowhere zero, and what goes into them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.model.gentron import random_values

TextTables = list[tuple[Tensor, Tensor]]


@dataclass
class Inputs:
    """Arguments of `GenTron.forward` for R rows, texts of different lengths."""

    latents: Tensor  # [R, F, C, h, w]
    timesteps: Tensor  # [R]
    hidden: list[Tensor]  # per encoder [R, L, W]
    mask: list[Tensor]  # per encoder [R, L], 1 for a token, 0 for padding
    pooled: Tensor | None  # [R, P]

    def forward(self, model: GenTron, motion_free: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(
                self.latents, self.timesteps, self.hidden, self.mask, self.pooled, motion_free
            )
        return output

    def tables(self, model: GenTron) -> tuple[Tensor, Tensor, TextTables]:
        """Modulation, final modulation and text tables, one page a row."""
        with torch.no_grad():
            modulation, final = model.conditioner(self.timesteps, self.pooled)
            text = [] if model.config.injection == "adaln" else self.project(model)
        return modulation, final, text

    def project(self, model: GenTron) -> TextTables:
        with torch.no_grad():
            tables: TextTables = model.text_projection(self.hidden, self.mask)
        return tables


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more by waiting for a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_model() -> Callable[[GenTronConfig], GenTron]:
    """The network of a configuration with `random_values`: no gate is closed."""

    def make(config: GenTronConfig) -> GenTron:
        model = GenTron(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                seed = zlib.crc32(name.encode())
                parameter.copy_(random_values(name, tuple(parameter.shape), seed))
        return model

    return make


@pytest.fixture(scope="session")
def random_inputs() -> Callable[..., Inputs]:
    def make(
        config: GenTronConfig,
        *,
        rows: int = 2,
        frames: int = 1,
        size: tuple[int, int] = (4, 6),
        seed: int = 0,
    ) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        hidden, mask = [], []
        for text in config.text:
            hidden.append(torch.randn(rows, text.max_tokens, text.width, generator=g))
            length = torch.arange(rows)[:, None] % 5 + 3  # 3 to 7 tokens, then padding
            mask.append((torch.arange(text.max_tokens)[None] < length).long())
        return Inputs(
            torch.randn(rows, frames, config.latent_channels, *size, generator=g),
            torch.rand(rows, generator=g) * 999,
            hidden,
            mask,
            torch.randn(rows, config.pooled_width, generator=g) if config.pooled_width else None,
        )

    return make
