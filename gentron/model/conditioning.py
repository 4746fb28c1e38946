"""What does not depend on the token grid, and so runs once per text or once per (text, step)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gentron.config import GenTronConfig
from gentron.contract import MASKED
from gentron.model.layers import head_norm, sinusoid


class Embedder(nn.Module):
    """Linear, SiLU, Linear; float32 in every precision (it is small, and t needs the digits)."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.inner = nn.Linear(features, width, dtype=torch.float32)
        self.outer = nn.Linear(width, width, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x)))


class Conditioner(nn.Module):
    """`c = MLP(sinusoid(t)) + MLP(pooled text)`, then every block's adaLN projection of it."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        self.time = Embedder(config.time_features, config.width)
        self.text = Embedder(config.pooled_width, config.width) if config.pooled_width else None
        self.adaln = nn.ModuleList(
            nn.Linear(config.width, 6 * config.width) for _ in range(config.depth)
        )
        self.final = nn.Linear(config.width, 2 * config.width, dtype=torch.float32)

    def forward(self, timesteps: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """timesteps [T] in 0..1000, pooled [T, P] -> modulation [T, depth, 6, D] and the final
        norm's shift and scale, float32 [T, 2, D]."""
        c = self.time(sinusoid(timesteps, self.config.time_features))
        if self.text is not None:
            assert pooled is not None
            c = c + self.text(pooled)
        c = F.silu(c)
        final = self.final(c).unflatten(-1, (2, self.config.width))
        low = c.to(self.adaln[0].weight.dtype)
        rows = [layer(low).unflatten(-1, (6, self.config.width)) for layer in self.adaln]
        return torch.stack(rows, dim=1), final


class TextProjection(nn.Module):
    """Cross-attention keys and values of every block, from the encoders' own widths."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(
            nn.ModuleList(
                _KeyValue(text.width, config) for _ in config.text_blocks(encoder)
            )
            for encoder, text in enumerate(config.text)
        )  # fmt: skip

    def forward(self, hidden: list[Tensor], mask: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per encoder: hidden [U, L, W] float32, mask [U, L] int64 (1 = token, 0 = padding) ->
        text_kv [U, blocks, 2, heads, L, d] and the additive text_bias [U, 1, 1, L]."""
        tables = []
        for text, blocks, tokens, real in zip(
            self.config.text, self.encoders, hidden, mask, strict=True
        ):
            dtype = blocks[0].to_kv.weight.dtype
            table = torch.stack([block(tokens.to(dtype)) for block in blocks], dim=1)
            padding = torch.zeros_like(real) if text.attend_padding else 1 - real
            tables.append((table, (padding.to(dtype) * MASKED)[:, None, None, :]))
        return tables


class _KeyValue(nn.Module):
    def __init__(self, text_width: int, config: GenTronConfig):
        super().__init__()
        self.heads = config.heads
        self.to_kv = nn.Linear(text_width, 2 * config.width)
        self.norm_k = head_norm(config.qk_norm, config.head_width)

    def forward(self, tokens: Tensor) -> Tensor:
        kv = rearrange(self.to_kv(tokens), "u l (two g d) -> u two g l d", two=2, g=self.heads)
        return torch.stack([self.norm_k(kv[:, 0]), kv[:, 1]], dim=1)
