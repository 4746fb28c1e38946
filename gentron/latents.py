"""Sizes and values at the border between pixels and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.errors import BundleError, RequestError

MAX_LEVELS = 12  # of an autoencoder; published ones have 4 to 6


def vae_factor(vae_config: dict[str, Any]) -> int:
    """Pixels per latent along a side: every level but the last halves the picture."""
    for key in ("block_out_channels", "encoder_block_out_channels"):
        if key in vae_config:
            levels = vae_config[key]
            if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= MAX_LEVELS:
                raise BundleError(
                    f"vae/config.json: {key} must be a list of 1 to {MAX_LEVELS} channel counts"
                )
            return int(2 ** (len(levels) - 1))
    raise BundleError(
        "vae/config.json: neither block_out_channels nor encoder_block_out_channels is there, so "
        "the scale is unknown; use a diffusers autoencoder's own config.json"
    )


def native_size(config: GenTronConfig, factor: int) -> tuple[int, int]:
    """(width, height) in pixels that the model was trained at."""
    return config.sample_width * factor, config.sample_height * factor


def latent_size(config: GenTronConfig, factor: int, width: int, height: int) -> tuple[int, int]:
    """(h, w) of the latents for a picture size in pixels.

    Raises RequestError, with the nearest size that works, rather than rounding.
    """
    unit = config.patch * factor
    low, high = config.side_range
    low, high = -(-low // unit) * unit, high // unit * unit

    def nearest(side: int) -> int:
        return min(max((2 * side + unit) // (2 * unit) * unit, low), high)

    if nearest(width) != width or nearest(height) != height:
        raise RequestError(
            "size",
            f"{width}x{height} does not work: each side must be a multiple of {unit} from {low} "
            f"to {high}; try {nearest(width)}x{nearest(height)}",
        )
    return height // factor, width // factor


def to_uint8(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Decoder output [K, 3, H, W] in [-1, 1] -> raw pixels [K, H, W, 3]."""
    scaled = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))
