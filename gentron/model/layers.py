"""Pieces that the components share.

Axis letters: R rows, F frames, N patches, L tokens, D width, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6  # DiT


def layer_norm(x: Tensor) -> Tensor:
    """Normalisation without affine: adaLN supplies scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention over the last two axes, [..., heads, length, d].

    Written as MatMul, Softmax, MatMul with the query scaled first: the form that every compiler
    here fuses in 16 bits and also builds in 32. Softmax is float32 (in a float64 model, float64).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return at_least_float32(scores).softmax(-1).to(v.dtype) @ v


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeadNorm(nn.LayerNorm):
    """QK-norm: LayerNorm with affine over one head's channels."""

    def __init__(self, head_width: int):
        super().__init__(head_width, eps=NORM_EPS)


def head_norm(enabled: bool, head_width: int) -> nn.Module:
    return HeadNorm(head_width) if enabled else nn.Identity()


class SelfAttention(nn.Module):
    """Spatial self-attention, [R, F, N, D]: each frame attends to itself."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = head_norm(qk_norm, width // heads)
        self.norm_k = head_norm(qk_norm, width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.to_qkv(x), "r f n (three g d) -> three r f g n d",
                        three=3, g=self.heads)  # fmt: skip
        q, k, v = qkv.unbind(0)
        out = attention(self.norm_q(q), self.norm_k(k), v)
        return self.to_out(rearrange(out, "r f g n d -> r f n (g d)"))


class CrossAttention(nn.Module):
    """Pixels ask, text answers (figure 2b). Keys and values come ready from TextProjection."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.norm_q = head_norm(qk_norm, width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys_values: Tensor, bias: Tensor) -> Tensor:
        """x [R, F, N, D]; keys_values [R, 2, heads, L, d]; bias [R, 1, 1, L]."""
        frames = x.shape[1]
        q = rearrange(self.to_q(x), "r f n (g d) -> r g (f n) d", g=self.heads)
        out = attention(self.norm_q(q), keys_values[:, 0], keys_values[:, 1], bias)
        return self.to_out(rearrange(out, "r g (f n) d -> r f n (g d)", f=frames))


class TemporalAttention(nn.Module):
    """`x + TempSelfAttn(LN(x))` over frames, per patch (equations 3 to 5), residual excluded.

    Frame t is given `sum_s a(t, s) W_v x_s`. The frame codes enter the queries and keys; in the
    values as they are they would make a motion-free frame depend on its index, and an image would
    no longer be the motion-free case. With `frame_values` the values have them relative to the
    frame that asks, `W_v (x_s + code_s - code_t)`: a frame alone still sees W_v x_t.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, frame_values: bool = False):
        super().__init__()
        self.heads, self.frame_values = heads, frame_values
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = head_norm(qk_norm, width // heads)
        self.norm_k = head_norm(qk_norm, width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, frame_code: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, F, N, D] normalised; frame_code [F, 1, D]; bias [R, 1, 1, F, F], or None for
        frames that all see themselves alone."""
        if bias is None:
            return self.to_out(self.to_v(x))
        placed = x + frame_code
        values = placed if self.frame_values else x
        q, k, v = (
            rearrange(project(y), "r f n (g d) -> r n g f d", g=self.heads)
            for project, y in ((self.to_q, placed), (self.to_k, placed), (self.to_v, values))
        )
        out = attention(self.norm_q(q), self.norm_k(k), v, bias)
        out = rearrange(out, "r n g f d -> r f n (g d)")
        if self.frame_values:  # the weights of a frame sum to 1, so its own code leaves the sum
            out = out - F.linear(frame_code, self.to_v.weight)
        return self.to_out(out)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def sinusoid(positions: Tensor, features: int, *, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] of `positions * max_period^(-i / half)`, i < half; float32 [..., features]."""
    half = features // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[..., None] * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_code(
    rows: int,
    columns: int,
    width: int,
    base: int,
    interpolation: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Fixed 2-D code, float32 [rows * columns, width]: half for x, half for y, [sin, cos] each.

    Coordinates are `i / (size / base) / interpolation`, so every size spans the same range.
    """

    def axis(count: int) -> Tensor:
        # `count` may be symbolic while tracing, so it must not meet Python's division.
        positions = torch.arange(count, dtype=torch.float32, device=device)
        whole = torch.full((), count, dtype=torch.float32, device=device)
        positions = positions * (base / interpolation) / whole
        cos, sin = sinusoid(positions, width // 2).chunk(2, dim=-1)
        return torch.cat([sin, cos], dim=-1)

    across = axis(columns)[None].expand(rows, -1, -1)
    down = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)
