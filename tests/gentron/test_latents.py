"""Sizes at the border between pixels and latents, and the way to raw pixels."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from gentron.config import ModelSpec
from gentron.errors import BundleError, RequestError
from gentron.latents import latent_size, native_size, to_uint8, vae_factor
from gentron.presets import EMOJI, PRESETS, SD_VAE, TINY, XL2

XL = XL2.transformer  # sides are multiples of 16 from 64 to 2048


# --- sizes ---


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (512, 512, (64, 64)),
        (768, 512, (64, 96)),  # (h, w) from width x height
        (64, 2048, (256, 8)),
        (528, 496, (62, 66)),
    ],
)
def test_a_size_in_pixels_has_latents_of_an_eighth(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    assert latent_size(XL, 8, width, height) == expected


@pytest.mark.parametrize(
    ("size", "suggested"),
    [
        ((500, 512), "496x512"),
        ((512, 505), "512x512"),
        ((1, 512), "64x512"),
        ((48, 512), "64x512"),
        ((4096, 512), "2048x512"),
        ((513, 513), "512x512"),
        ((2056, 2056), "2048x2048"),
        ((0, 512), "64x512"),
        ((-512, 512), "64x512"),
        ((10**400, 512), "2048x512"),
    ],
)
def test_a_size_that_does_not_work_is_refused_with_the_nearest_that_does(
    size: tuple[int, int], suggested: str
) -> None:
    with pytest.raises(RequestError, match=f"multiple of 16 from 64 to 2048; try {suggested}$"):
        latent_size(XL, 8, *size)


sides = st.integers(-100, 5000)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    width=sides,
    height=sides,
    factor=st.sampled_from([1, 2, 8, 16, 32]),
    patch=st.sampled_from([1, 2, 4]),
    low=st.integers(1, 300),
    span=st.integers(128, 2000),
)
def test_a_size_is_either_exact_or_refused_with_one_that_is_accepted(
    width: int, height: int, factor: int, patch: int, low: int, span: int
) -> None:
    """Never rounded in silence, and the suggestion is as near as any size that works."""
    config = replace(XL, patch=patch, side_range=(low, low + span))
    unit = patch * factor
    allowed = [side for side in range(low, low + span + 1) if side % unit == 0]
    if width in allowed and height in allowed:
        expected = height // factor, width // factor
        assert latent_size(config, factor, width, height) == expected
        return
    with pytest.raises(RequestError) as caught:
        latent_size(config, factor, width, height)
    assert caught.value.field == "size"
    found = re.search(r"try (\d+)x(\d+)$", str(caught.value))
    assert found
    near = int(found[1]), int(found[2])
    for side, suggested in zip((width, height), near, strict=True):
        assert abs(side - suggested) == min(abs(side - other) for other in allowed)
    assert latent_size(config, factor, *near) == (near[1] // factor, near[0] // factor)


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())
def test_the_native_size_of_every_preset_is_accepted(spec: ModelSpec) -> None:
    factor = 8 if spec.name == "emoji" else vae_factor(spec.vae)
    width, height = native_size(spec.transformer, factor)
    config = spec.transformer
    assert latent_size(config, factor, width, height) == (config.sample_height, config.sample_width)


def test_the_native_size_is_width_by_height() -> None:
    config = replace(XL, sample_height=32, sample_width=48)
    assert native_size(config, 8) == (384, 256)
    assert native_size(EMOJI.transformer, 8) == (128, 128)


def test_the_factor_is_read_from_the_autoencoders_own_levels() -> None:
    assert vae_factor(SD_VAE) == 8
    assert vae_factor(TINY.vae) == 2
    assert vae_factor({"encoder_block_out_channels": [64] * 6}) == 32
    with pytest.raises(BundleError, match=r"vae/config\.json: neither block_out_channels nor"):
        vae_factor({"latent_channels": 4})


def test_the_factor_is_that_of_the_diffusers_autoencoder() -> None:
    vae = AutoencoderKL.from_config(TINY.vae)
    with torch.no_grad():
        pixels = vae.decode(torch.zeros(1, 4, 3, 5)).sample
    assert pixels.shape[-2:] == (3 * vae_factor(TINY.vae), 5 * vae_factor(TINY.vae))


# --- values ---


def test_the_ends_and_the_middle_of_the_range_are_where_they_should_be() -> None:
    values = np.array([-1.0, 1.0, -1.0 + 2 / 255, 1.0 - 2 / 255, 0.003], np.float32)
    pixels = np.broadcast_to(values[:, None, None, None], (5, 3, 2, 2))
    assert to_uint8(pixels)[:, 0, 0, 0].tolist() == [0, 255, 1, 254, 128]


@pytest.mark.parametrize(
    ("value", "expected"), [(-7.5, 0), (-1.0001, 0), (1.0001, 255), (9e9, 255)]
)
def test_values_outside_the_range_are_clipped_and_do_not_wrap(value: float, expected: int) -> None:
    assert (to_uint8(np.full((1, 3, 2, 2), value, np.float32)) == expected).all()


def test_every_raw_value_survives_the_way_there_and_back() -> None:
    raw = np.arange(256, dtype=np.uint8)
    pixels = (raw.astype(np.float32) / 127.5 - 1).reshape(1, 1, 16, 16).repeat(3, axis=1)
    assert (to_uint8(pixels)[0, :, :, 1].ravel() == raw).all()


def test_channels_come_last_and_lie_together() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 3, 4, 6)).astype(np.float32)
    raw = to_uint8(pixels)
    assert raw.shape == (2, 4, 6, 3)
    assert raw.dtype == np.uint8
    assert raw.flags.c_contiguous
    for channel in range(3):
        expected = np.rint((pixels[1, channel].astype(np.float64) + 1) / 2 * 255)
        assert np.abs(raw[1, :, :, channel] - expected).max() <= 1  # a tie may round either way
        assert (raw[1, :, :, channel] == expected).mean() > 0.95
