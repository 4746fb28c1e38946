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
        return self.outer(F.silu(self.inner(x.to(self.inner.weight.dtype))))


class SizeEmbedder(nn.Module):
    """The micro-conditioning of PixArt-alpha 1024: height, width and aspect ratio, a third of the
    width each (arXiv 2310.00426, section 2.4; diffusers' class
    PixArtAlphaCombinedTimestepSizeEmbeddings). Height and width share their layers."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.features = features
        self.side = Embedder(features, width // 3)
        self.ratio = Embedder(features, width // 3)

    def forward(self, size: Tensor) -> Tensor:
        """size [T, 2], height and width in pixels -> [T, D]."""
        ratio = size[:, :1] / size[:, 1:]
        sides = self.side(sinusoid(size, self.features)).flatten(1)  # [T, 2 D/3]
        return torch.cat([sides, self.ratio(sinusoid(ratio, self.features)).flatten(1)], dim=1)


class SharedModulation(nn.Module):
    """PixArt's adaLN-single: one projection for all blocks and a table for each (arXiv 2310.00426,
    section 2.3); the final norm adds a table to the condition itself.

    It runs in float32 in every precision; the blocks' rows are rounded once, at the end.
    """

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, 6 * config.width, dtype=torch.float32)
        self.table = nn.Parameter(torch.zeros(config.depth, 6, config.width))
        self.final_table = nn.Parameter(torch.zeros(2, config.width, dtype=torch.float32))

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """c [T, D] before its activation -> [T, depth, 6, D] and [T, 2, D]."""
        common = self.linear(F.silu(c)).unflatten(-1, self.table.shape[1:])  # [T, 6, D]
        rows = common[:, None] + self.table.to(common.dtype)
        return rows.to(self.table.dtype), self.final_table + c[:, None]


class Conditioner(nn.Module):
    """`c = MLP(sinusoid(t)) + MLP(pooled text)`, then every block's adaLN projection of it."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        width, features = config.width, config.time_features
        self.time = Embedder(features, width)
        self.text = Embedder(config.pooled_width, width) if config.pooled_width else None
        self.size = SizeEmbedder(features, width) if config.size_conditioning else None
        if config.adaln == "shared":
            self.shared = SharedModulation(config)
            return
        self.adaln = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(config.depth))
        self.final = nn.Linear(width, 2 * width, dtype=torch.float32)

    def embedders(self) -> list[Embedder]:
        return [module for module in self.modules() if isinstance(module, Embedder)]

    def modulation_layers(self) -> list[nn.Module]:
        """What a fresh model starts at zero."""
        return [self.shared] if self.config.adaln == "shared" else [*self.adaln, self.final]

    def forward(
        self, timesteps: Tensor, pooled: Tensor | None = None, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """timesteps [T] in 0..1000, pooled [T, P], size [T, 2] (height and width in pixels) ->
        modulation [T, depth, 6, D] and the final norm's shift and scale, float32 [T, 2, D]."""
        c = self.time(sinusoid(timesteps, self.config.time_features))
        if self.text is not None:
            assert pooled is not None
            c = c + self.text(pooled)
        if self.size is not None:
            assert size is not None
            c = c + self.size(size)
        if self.config.adaln == "shared":
            return self.shared(c)
        c = F.silu(c)
        final = self.final(c).unflatten(-1, (2, self.config.width))
        low = c.to(self.adaln[0].weight.dtype)
        rows = [layer(low).unflatten(-1, (6, self.config.width)) for layer in self.adaln]
        return torch.stack(rows, dim=1), final


class TextProjection(nn.Module):
    """Cross-attention keys and values of every block, from the encoders' own widths, or through
    an MLP that all blocks of an encoder share."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        self.captions = nn.ModuleList(
            CaptionMlp(text.width, config.width) if text.projected else nn.Identity()
            for text in config.text
        )
        self.encoders = nn.ModuleList(
            nn.ModuleList(
                _KeyValue(config.width if text.projected else text.width, config)
                for _ in config.text_blocks(encoder)
            )
            for encoder, text in enumerate(config.text)
        )

    def forward(self, hidden: list[Tensor], mask: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per encoder: hidden [U, L, W] float32, mask [U, L] int64 (1 = token, 0 = padding) ->
        text_kv [U, blocks, 2, heads, L, d] and the additive text_bias [U, 1, 1, L]."""
        tables = []
        for text, caption, blocks, tokens, real in zip(
            self.config.text, self.captions, self.encoders, hidden, mask, strict=True
        ):
            dtype = blocks[0].to_kv.weight.dtype
            projected = caption(tokens.to(dtype))
            table = torch.stack([block(projected) for block in blocks], dim=1)
            padding = torch.zeros_like(real) if text.attend_padding else 1 - real
            tables.append((table, (padding.to(dtype) * MASKED)[:, None, None, :]))
        return tables


class CaptionMlp(nn.Module):
    """Linear, tanh-GELU, Linear, from an encoder's width to the transformer's (diffusers' class
    PixArtAlphaTextProjection)."""

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.inner = nn.Linear(text_width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(tokens), approximate="tanh"))


class _KeyValue(nn.Module):
    def __init__(self, text_width: int, config: GenTronConfig):
        super().__init__()
        self.heads = config.heads
        self.to_kv = nn.Linear(text_width, 2 * config.width)
        self.norm_k = head_norm(config.qk_norm, config.head_width)

    def forward(self, tokens: Tensor) -> Tensor:
        kv = rearrange(self.to_kv(tokens), "u l (two g d) -> u two g l d", two=2, g=self.heads)
        return torch.stack([self.norm_k(kv[:, 0]), kv[:, 1]], dim=1)
