"""The token path, and the sampling step built around it: what runs once per step (one call)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from gentron.config import GenTronConfig
from gentron.contract import MASKED
from gentron.model.layers import (
    CrossAttention,
    Mlp,
    SelfAttention,
    TemporalAttention,
    at_least_float32,
    grid_code,
    layer_norm,
    modulate,
    sinusoid,
)

# A block's place among those of its encoder -> keys and values, and their bias.
TextOfBlock = Callable[[int], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """adaLN-Zero self-attention, cross-attention, temporal attention, adaLN-Zero MLP (figure 2)."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        width, heads, qk_norm = config.width, config.heads, config.qk_norm
        self.attention = SelfAttention(width, heads, qk_norm)
        self.cross_norm = layer_norm if config.cross_attention_norm else nn.Identity()
        self.cross = (
            CrossAttention(width, heads, qk_norm) if config.injection == "cross_attention" else None
        )
        self.temporal = (
            TemporalAttention(width, heads, qk_norm, config.frame_values)
            if config.temporal
            else None
        )
        self.mlp = Mlp(width, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor] | None,
        motion: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor:
        """x [R, F, N, D]; modulation [R, 6, D]; text is (keys and values, bias), motion is
        (frame code, mask); each as its attention takes it."""
        rows = modulation[:, :, None, None, :].unbind(1)  # six of [R, 1, 1, D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows
        x = x + gate_a * self.attention(modulate(layer_norm(x), shift_a, scale_a))
        if self.cross is not None and text is not None:
            x = x + self.cross(self.cross_norm(x), *text)
        if self.temporal is not None and motion is not None:
            x = x + self.temporal(layer_norm(x), *motion)  # eqs. 3-5
        return x + gate_m * self.mlp(modulate(layer_norm(x), shift_m, scale_m))


class Denoiser(nn.Module):
    """`predict` is the network of the paper; `forward` is one guided sampling step around it.

    Conditioning is read from tables by row index, so rows of different requests, steps and texts
    share a call. The tail (final norm, linear, guidance, solver) is float32 in every precision.
    """

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch**2
        self.patchify = nn.Linear(patch_values, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = nn.Linear(config.width, patch_values, dtype=torch.float32)

    def predict(
        self,
        latents: Tensor,
        modulation: Tensor,
        final_modulation: Tensor,
        row_modulation: Tensor,
        row_text: Tensor | None,
        row_motion_free: Tensor | None,
        text_tables: list[tuple[Tensor, Tensor]],
        frame_places: Tensor | None = None,
    ) -> Tensor:
        """Raw network output per row, float32 [R, F, C, h, w].

        latents [R, F, C, h, w]; modulation [T, depth, 6, D]; final_modulation [T, 2, D]; one pair
        (text_kv [U, blocks_i, 2, heads, L_i, d], text_bias [U, 1, 1, L_i]) per encoder;
        frame_places [F], 0 to F - 1 unless told. Without `row_text`, row r has text r.
        """
        config, dtype = self.config, self.patchify.weight.dtype
        p = config.patch
        frames, height, width = latents.shape[1], latents.shape[3] // p, latents.shape[4] // p
        patches = rearrange(
            latents, "r f c (y p) (x q) -> r f (y x) (c p q)", p=p, q=p, y=height, x=width
        )
        position = grid_code(
            height,
            width,
            config.width,
            config.position_base,
            config.position_interpolation,
            latents.device,
        )
        x = self.patchify(patches.to(dtype)) + position.to(dtype)  # [R, F, N, D]
        rows = modulation.index_select(0, row_modulation)  # [R, depth, 6, D]
        motion = None
        if config.temporal:
            assert row_motion_free is not None
            if frame_places is None:
                frame_places = torch.arange(frames, device=latents.device)
            code = frame_code(frame_places, config.width).to(dtype)
            alone = self.training and frames == 1  # a graph that is traced takes any number
            motion = code, None if alone else motion_bias(row_motion_free, frames, dtype)
        texts = [
            _own_texts(*tables) if row_text is None else _gathered_texts(*tables, row_text)
            for tables in text_tables
        ]
        for index, block in enumerate(self.blocks):
            text = texts[index % len(texts)](index // len(texts)) if texts else None
            x = block(x, rows[:, index], text, motion)
        shift, scale = final_modulation.index_select(0, row_modulation)[:, :, None, None].unbind(1)
        out = self.final(modulate(layer_norm(at_least_float32(x)), shift, scale))
        return rearrange(out, "r f (y x) (p q c) -> r f c (y p) (x q)", p=p, q=p, y=height, x=width)

    def forward(
        self,
        state: Tensor,
        row_sample: Tensor,
        row_modulation: Tensor,
        row_text: Tensor | None,
        row_motion_free: Tensor | None,
        slots: Tensor,
        guidance: Tensor,
        update: Tensor,
        noise: Tensor,
        modulation: Tensor,
        final_modulation: Tensor,
        text_tables: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """One step of every sample: guidance (eq. 6) and solver are data. Axes as in the contract.

        Returns the next state [B, 3, F, C, h, w] and `bad` [B], true where anything left the
        finite numbers.
        """
        latents = state[:, 0].index_select(0, row_sample)  # [R, F, C, h, w]
        output = self.predict(
            latents,
            modulation,
            final_modulation,
            row_modulation,
            row_text,
            row_motion_free,
            text_tables,
        )
        # Branches are gathered per sample. A matrix over all rows would let 0 x NaN cross samples.
        branches = output.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        prediction = (guidance[:, :, None, None, None, None] * branches).sum(1)  # eq. 6
        terms = torch.cat([state, prediction[:, None], noise[:, None]], dim=1)  # [B, 5, ...]
        next_state = (update @ terms.flatten(2)).reshape(state.shape)
        bad = next_state.flatten(1).isfinite().logical_not().any(dim=1)
        return next_state, bad


def _gathered_texts(table: Tensor, bias: Tensor, row_text: Tensor) -> TextOfBlock:
    """table [U, blocks, 2, heads, L, d], bias [U, 1, 1, L], row_text [R]."""
    row_bias = bias.index_select(0, row_text)

    def text(block: int) -> tuple[Tensor, Tensor]:
        # A gather, never `table[:, block]`: that copies every text of the table.
        page = row_text * table.shape[1] + block
        return table.flatten(0, 1).index_select(0, page), row_bias

    return text


def _own_texts(table: Tensor, bias: Tensor) -> TextOfBlock:
    """table [R, blocks, 2, heads, L, d], bias [R, 1, 1, L]: the gradient of a gather would be a
    whole table for every block."""
    pages = table.unbind(1)
    return lambda block: (pages[block], bias)


def frame_code(places: Tensor, width: int) -> Tensor:
    """What tells a frame's place in its clip: places [F] -> [F, 1, D], sinusoids."""
    return sinusoid(places, width)[:, None]


def motion_bias(row_motion_free: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """The identity mask over frames for motion-free rows (section 3.3.2): [R, 1, 1, F, F]."""
    index = torch.arange(frames, device=row_motion_free.device)
    other = index[:, None] != index[None, :]  # [F, F]
    masked = row_motion_free[:, None, None, None, None] & other
    return masked.to(dtype) * MASKED
