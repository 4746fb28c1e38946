"""PixArt's tensors and ours: every name and shape of a checkpoint, and what becomes of each.

Names on the left are GenTron's; sources are those of diffusers' PixArtTransformer2DModel. All of it
moves numbers and computes nothing, so an import is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.errors import BundleError

FEATURES = 256  # of the time and size sinusoids (PixArtAlphaCombinedTimestepSizeEmbeddings)
SIZE_LAYERS = "adaln_single.emb.resolution_embedder."  # there in models with size conditioning
# Never used to compute: a buffer that diffusers 0.22 to 0.25 stored, and a position code that is
# computed.
UNUSED = ("caption_projection.y_embedding", "pos_embed.pos_embed")
NAMED = 12  # tensors in an error's one line

_REFUSED = (
    (r"\.(sr|kv_compress\w*)\.", "KV-compressed self-attention, which is not supported; use a "
     "checkpoint trained without it, such as PixArt-Sigma 512 or 1024"),
    (r"\.(q_norm|k_norm|norm_q|norm_k)\.", "QK-norm, which is not supported for PixArt; use a "
     "checkpoint trained with qk_norm false, as the released ones are"),
    (r"^(x_embedder|y_embedder|t_embedder|blocks)\.", "the layout of PixArt's own training code; "
     "convert it first with diffusers' scripts/convert_pixart_alpha_to_diffusers.py or "
     "convert_pixart_sigma_to_diffusers.py"),
    (r"\.lora_|\.lora\.|_lora\.", "a LoRA, not a transformer; give the pipeline it belongs to"),
    (r"^(controlnet|controlnet_blocks)\.", "a ControlNet, which is not supported"),
)  # fmt: skip


class Rule(NamedTuple):
    """How one of our tensors is made."""

    sources: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


def source_shapes(config: GenTronConfig, head_channels: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that a PixArt checkpoint of this configuration holds; 603 for the released
    models without size conditioning, 611 with it."""
    width, patch = config.width, config.patch
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (width, config.latent_channels, patch, patch),
        "pos_embed.proj.bias": (width,),
        "scale_shift_table": (2, width),
    }

    def linear(name: str, into: int, out: int = width) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    linear("adaln_single.emb.timestep_embedder.linear_1", FEATURES)
    linear("adaln_single.emb.timestep_embedder.linear_2", width)
    if config.size_conditioning:
        for kind in ("resolution", "aspect_ratio"):
            linear(f"adaln_single.emb.{kind}_embedder.linear_1", FEATURES, width // 3)
            linear(f"adaln_single.emb.{kind}_embedder.linear_2", width // 3, width // 3)
    linear("adaln_single.linear", width, 6 * width)
    linear("caption_projection.linear_1", config.text[0].width)
    linear("caption_projection.linear_2", width)
    for index in range(config.depth):
        block = f"transformer_blocks.{index}"
        shapes[f"{block}.scale_shift_table"] = (6, width)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(f"{block}.attn1.{layer}", width)
            linear(f"{block}.attn2.{layer}", width)
        linear(f"{block}.ff.net.0.proj", width, config.mlp_width)
        linear(f"{block}.ff.net.2", config.mlp_width)
    linear("proj_out", width, patch * patch * head_channels)
    return shapes


def pixart_rules(config: GenTronConfig, head_channels: int) -> dict[str, Rule]:
    """For every tensor of our transformer, where it comes from."""
    rules: dict[str, Rule] = {}

    def layer(
        target: str, *sources: str, make: Callable[[list[Tensor]], Tensor] = torch.cat
    ) -> None:
        for kind in ("weight", "bias"):
            rules[f"{target}.{kind}"] = Rule(tuple(f"{s}.{kind}" for s in sources), make)

    def embedder(target: str, source: str) -> None:
        layer(f"{target}.inner", f"{source}.linear_1")
        layer(f"{target}.outer", f"{source}.linear_2")

    embedder("conditioner.time", "adaln_single.emb.timestep_embedder")
    if config.size_conditioning:
        embedder("conditioner.size.side", "adaln_single.emb.resolution_embedder")
        embedder("conditioner.size.ratio", "adaln_single.emb.aspect_ratio_embedder")
    layer("conditioner.shared.linear", "adaln_single.linear")
    blocks = [f"transformer_blocks.{index}" for index in range(config.depth)]
    tables = tuple(f"{block}.scale_shift_table" for block in blocks)
    rules["conditioner.shared.table"] = Rule(tables, torch.stack)
    rules["conditioner.shared.final_table"] = Rule(("scale_shift_table",), torch.cat)
    embedder("text_projection.captions.0", "caption_projection")
    layer("denoiser.patchify", "pos_embed.proj", make=_flat)
    for index, block in enumerate(blocks):
        ours = f"denoiser.blocks.{index}"
        layer(f"{ours}.attention.to_qkv", *(f"{block}.attn1.to_{x}" for x in "qkv"))
        layer(f"{ours}.attention.to_out", f"{block}.attn1.to_out.0")
        layer(f"{ours}.cross.to_q", f"{block}.attn2.to_q")
        layer(f"{ours}.cross.to_out", f"{block}.attn2.to_out.0")
        kv = f"text_projection.encoders.0.{index}.to_kv"
        layer(kv, f"{block}.attn2.to_k", f"{block}.attn2.to_v")
        layer(f"{ours}.mlp.up", f"{block}.ff.net.0.proj")
        layer(f"{ours}.mlp.down", f"{block}.ff.net.2")
    layer("denoiser.final", "proj_out", make=_epsilon_rows(config, head_channels))
    return rules


def _flat(values: list[Tensor]) -> Tensor:
    """A convolution whose kernel is its stride, as a linear layer over (c p q)."""
    return values[0].flatten(1) if values[0].dim() > 1 else values[0]


def _epsilon_rows(config: GenTronConfig, head_channels: int) -> Callable[[list[Tensor]], Tensor]:
    """The head's rows are (p q c); of each patch position the first channels are epsilon."""

    def keep(values: list[Tensor]) -> Tensor:
        rows = values[0].unflatten(0, (config.patch**2, head_channels))
        return rows[:, : config.latent_channels].flatten(0, 1).contiguous()

    return keep


def check_names(
    where: str, names: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises BundleError for a kind of checkpoint that is not supported, by its name; else for all
    tensors that are missing, extra or of another shape, together."""
    for pattern, what in _REFUSED:
        if found := sorted(name for name in names if re.search(pattern, name)):
            raise BundleError(f"{where}: {found[0]} belongs to {what}")
    wrong = [f"missing: {name}" for name in sorted(set(expected) - set(names))]
    wrong += [f"not part of PixArt: {n}" for n in sorted(set(names) - set(expected) - set(UNUSED))]
    wrong += [
        f"shape {list(names[name])}, not {list(shape)}: {name}"
        for name, shape in expected.items()
        if name in names and tuple(names[name]) != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise BundleError(
            f"{where}: {len(wrong)} tensors are not what its config.json asks for; give it the "
            "config.json that belongs to these weights: " + "; ".join(wrong[:NAMED]) + more
        )
