"""What a transformer's components cost: floating point operations and bytes, by the axes' sizes.

Counted from the shapes of the products (a multiply and an add are two operations), as the graphs
have them. Norms, activations, softmax and solver are left out: under one percent of the operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gentron.config import GenTronConfig

TABLE_BYTES = 4  # of `final_modulation` and the state, which are float32 in every precision


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: float
    weight_bytes: float  # read once a call, however many rows it has
    table_bytes: float  # rows of the conditioning tables, read or written
    activation_bytes: float  # what fused kernels still write and read again; an estimate

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.table_bytes + self.activation_bytes


def denoiser_cost(config: GenTronConfig, sizes: Mapping[str, int], item: int) -> Cost:
    """One step with sizes B, R, F, h, w; `item` is the bytes of one value in the graph's type."""
    rows, frames = sizes["R"], sizes["F"]
    tokens = sizes["h"] * sizes["w"] // config.patch**2  # N
    width, mlp, depth = config.width, config.mlp_width, config.depth
    patch_values = config.latent_channels * config.patch**2
    all_tokens = rows * frames * tokens

    weights = depth * (4 * width**2 + 2 * width * mlp)
    products = depth * (2 * tokens * width)  # self-attention: queries by keys, then by values
    # Values that one token writes and reads again in one block: queries, keys and values, the
    # attention's result, the hidden layer of the MLP, and the residual stream before each part.
    moved = depth * (4 * width + mlp + 2 * width)
    if config.injection == "cross_attention":
        weights += depth * 2 * width**2
        lengths = [config.text[i % len(config.text)].max_tokens for i in range(depth)]
        products += sum(2 * length * width for length in lengths)
        moved += depth * 3 * width
    if config.temporal:
        weights += depth * 4 * width**2
        products += depth * 2 * frames * width
        moved += depth * 5 * width
    ends = 2 * width * patch_values  # into tokens and out of them
    latents = frames * config.latent_channels * sizes["h"] * sizes["w"]
    return Cost(
        flops=2.0 * all_tokens * (weights + products + ends),
        weight_bytes=float(weights * item + ends // 2 * (item + TABLE_BYTES)),
        table_bytes=float(rows * _row_values(config) * item),
        activation_bytes=2.0 * all_tokens * moved * item
        + sizes["B"] * latents * TABLE_BYTES * 7,  # three slots in, three out, the noise
    )


def conditioner_cost(config: GenTronConfig, rows: int, item: int) -> Cost:
    """`rows` of the modulation tables; the projections of every block are the bulk of it."""
    width = config.width
    embedders = config.time_features * width + width**2
    if config.pooled_width:
        embedders += config.pooled_width * width + width**2
    layers = 1 if config.adaln == "shared" else config.depth
    weights = layers * 6 * width**2
    final = 0 if config.adaln == "shared" else 2 * width**2
    return Cost(
        flops=2.0 * rows * (weights + final + embedders),
        weight_bytes=float(weights * item + (embedders + final) * TABLE_BYTES),
        table_bytes=float(rows * (config.depth * 6 * width * item + 2 * width * TABLE_BYTES)),
        activation_bytes=0.0,
    )


def projection_cost(config: GenTronConfig, texts: int, item: int) -> Cost:
    """Keys and values of every cross-attention for `texts`; nothing if the model has none."""
    if config.injection != "cross_attention":
        return Cost(0.0, 0.0, 0.0, 0.0)
    weights, flops = 0, 0.0
    for index, text in enumerate(config.text):
        blocks, taken = len(config.text_blocks(index)), text.width
        if text.projected:
            weights += text.width * config.width + config.width**2
            flops += 2.0 * texts * text.max_tokens * (text.width + config.width) * config.width
            taken = config.width
        weights += blocks * taken * 2 * config.width
        flops += 2.0 * texts * text.max_tokens * blocks * taken * 2 * config.width
    return Cost(flops, float(weights * item), float(texts * _text_values(config) * item), 0.0)


def _text_values(config: GenTronConfig) -> int:
    """Keys and values of one text."""
    return sum(
        len(config.text_blocks(i)) * 2 * text.max_tokens * config.width
        for i, text in enumerate(config.text)
    )


def _row_values(config: GenTronConfig) -> int:
    """What one row reads from the tables."""
    rows = config.depth * 6 * config.width
    return rows + (_text_values(config) if config.injection == "cross_attention" else 0)
