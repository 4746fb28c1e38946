"""GenTron's configuration from that of diffusers' PixArtTransformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gentron.config import GenTronConfig, TextConfig
from gentron.errors import BundleError
from gentron.export.pixart_tensors import SIZE_LAYERS

TRANSFORMERS = ("PixArtTransformer2DModel", "Transformer2DModel")
# Values of the transformer's config.json that this network has; the first is the class's default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_single",),
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_bias": (True,),
    "attention_type": ("default", None),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "num_vector_embeds": (None,),
    "qk_norm": (None, False),
}


def pixart_config(
    values: Mapping[str, Any],
    where: str,
    *,
    text_width: int,
    max_tokens: int,
    size_conditioning: bool,
    factor: int,
) -> GenTronConfig:
    """GenTron's configuration from the contents of a PixArt transformer's config.json.

    `size_conditioning` is whether the weights have its layers, `factor` pixels per latent. Raises
    BundleError, beginning with `where`, for what diffusers' class cannot be or we do not do.
    """
    name = values.get("_class_name")
    if name not in TRANSFORMERS:
        raise BundleError(f"{where}: {name!r} is not supported; one of {', '.join(TRANSFORMERS)}")
    for key, allowed in _FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise BundleError(
                f"{where}: {key} {values[key]!r} is not supported; PixArt has {allowed[0]!r}"
            )
    said = values.get("use_additional_conditions")
    if said is not None and said != size_conditioning:
        raise BundleError(
            f"{where}: use_additional_conditions is {said}, but the weights "
            f"{'have' if size_conditioning else 'lack'} {SIZE_LAYERS}*; correct what is wrong"
        )
    try:
        heads, head_width = int(values["num_attention_heads"]), int(values["attention_head_dim"])
        channels, patch = int(values["in_channels"]), int(values["patch_size"])
        depth, sample = int(values["num_layers"]), int(values["sample_size"])
        captions = int(values["caption_channels"])
        scale = values.get("interpolation_scale")
        interpolation = float(max(sample // 64, 1) if scale is None else scale)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{where}: not a PixArt configuration ({error!r}); copy it again"
        ) from None
    width = heads * head_width
    if min(heads, head_width, channels, patch, depth, sample) < 1 or sample % patch:
        raise BundleError(
            f"{where}: sizes that no network has: num_attention_heads {heads}, attention_head_dim "
            f"{head_width}, in_channels {channels}, num_layers {depth}, sample_size {sample} in "
            f"patches of {patch}; copy it again"
        )
    if not 0 < interpolation < math.inf:
        raise BundleError(f"{where}: interpolation_scale {scale!r} must be positive; copy it again")
    if values.get("out_channels") not in (None, channels, 2 * channels):
        raise BundleError(
            f"{where}: out_channels {values['out_channels']} is not supported; PixArt predicts "
            f"noise ({channels}) or noise and variance ({2 * channels})"
        )
    if values.get("cross_attention_dim", width) != width:
        raise BundleError(
            f"{where}: cross_attention_dim {values['cross_attention_dim']!r} is not supported; "
            f"PixArt's is its width, {width}"
        )
    if captions != text_width:
        raise BundleError(
            f"{where}: caption_channels {captions}, the text encoder is {text_width} wide; give "
            "the pipeline the text_encoder it was trained with"
        )
    native = sample * factor
    return GenTronConfig(
        width=width,
        depth=depth,
        mlp_width=4 * width,
        text=(TextConfig("t5", text_width, max_tokens, projected=True, lower_case=True),),
        heads=heads,
        latent_channels=channels,
        patch=patch,
        sample_height=sample,
        sample_width=sample,
        cross_attention_norm=False,
        adaln="shared",
        size_conditioning=size_conditioning,
        position_base=sample // patch,
        position_interpolation=interpolation,
        side_range=(min(64, native), max(2048, 2 * native)),
    )
