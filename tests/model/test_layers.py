"""Position codes, patches and QK-norm against their formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from numpy.typing import NDArray
from torch import Tensor, nn

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.model.layers import attention, grid_code, layer_norm, sinusoid
from gentron.presets import preset

MakeModel = Callable[[GenTronConfig], GenTron]
MakeInputs = Callable[..., Any]
Array = NDArray[np.float64]

TINY, VIDEO = preset("tiny").transformer, preset("tiny-video").transformer

GRIDS = [(4, 4, 4, 1.0), (3, 5, 4, 1.0), (7, 2, 32, 1.0), (6, 10, 64, 2.0), (1, 1, 8, 0.5)]


def code_at(y: float, x: float, width: int) -> list[float]:
    """x first, then y; of each sine, then cosine, at frequencies 10000^(-j / (D/4))."""
    quarter = width // 4
    angles = [
        [place * 10000.0 ** (-j / quarter) for j in range(quarter)] for place in (x, y)
    ]  # fmt: skip
    return [f(angle) for axis in angles for f in (np.sin, np.cos) for angle in axis]


@pytest.mark.parametrize(("rows", "columns", "base", "interpolation"), GRIDS)
def test_the_position_code_is_its_formula(
    rows: int, columns: int, base: int, interpolation: float
) -> None:
    """Coordinates are i / (size / base) / interpolation; patches go along rows."""
    ours = grid_code(rows, columns, 64, base, interpolation).numpy()
    expected = [
        code_at(y / (rows / base) / interpolation, x / (columns / base) / interpolation, 64)
        for y in range(rows)
        for x in range(columns)
    ]
    # Angles up to 64 in float32 are known to 4e-6.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "base", "interpolation"), GRIDS)
def test_the_position_code_is_that_of_diffusers(
    rows: int, columns: int, base: int, interpolation: float
) -> None:
    theirs = get_2d_sincos_pos_embed(
        64, (rows, columns), base_size=base, interpolation_scale=interpolation, output_type="pt"
    )
    ours = grid_code(rows, columns, 64, base, interpolation)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-5)


def test_the_time_code_is_cosines_then_sines() -> None:
    times = [0.0, 0.5, 1.0, 47.0, 999.0]
    ours = sinusoid(torch.tensor(times), 256).numpy()
    angles = np.array(times)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # 999 in float32 times a frequency that is rounded too: 1e-4 of a radian.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


def test_patches_are_channel_first_going_in_and_channel_last_coming_out(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """Without blocks: out = final(modulate(LN(patchify(patch) + position))), place by place."""
    model, inputs = random_model(TINY), random_inputs(TINY, rows=1, size=(4, 6))
    model.denoiser.blocks = nn.ModuleList()
    modulation, final, _ = inputs.tables(random_model(TINY))
    row = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        ours = model.denoiser.predict(inputs.latents, modulation, final, row, row, None, [])
    network = {n: p.detach().double().numpy() for n, p in model.denoiser.named_parameters()}
    shift, scale = final[0].double().numpy()
    expected = np.empty((4, 4, 6))
    for y, x in np.ndindex(2, 3):
        place = np.s_[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        patch = inputs.latents[0, 0].double().numpy()[place].reshape(-1)  # (c p q)
        token = network["patchify.weight"] @ patch + network["patchify.bias"]
        token = token + code_at(y / (2 / TINY.position_base), x / (3 / TINY.position_base), 64)
        token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
        values = network["final.weight"] @ (token * (1 + scale) + shift) + network["final.bias"]
        expected[place] = values.reshape(2, 2, 4).transpose(2, 0, 1)  # (p q c)
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, rtol=0, atol=1e-4)


def test_attention_is_its_formula_with_an_additive_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    bias = torch.where(torch.arange(7) < 4, 0.0, -1e4)
    ours = attention(q, k, v, bias).double()
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / 8**0.5
    weights = scores[..., :4].exp()  # the masked keys are as good as absent
    expected = (weights / weights.sum(-1, keepdim=True)) @ v[:, :, :4].double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def scale_queries_and_keys(model: GenTron) -> None:
    """Ten times the queries and keys of every attention."""
    with torch.no_grad():
        for block in model.denoiser.blocks:
            width = model.config.width
            layers = [block.cross.to_q, block.temporal.to_q, block.temporal.to_k]
            block.attention.to_qkv.weight[: 2 * width] *= 10
            block.attention.to_qkv.bias[: 2 * width] *= 10
            for layer in layers:
                layer.weight *= 10
                layer.bias *= 10
        for pages in model.text_projection.encoders:
            for page in pages:
                page.to_kv.weight[:width] *= 10
                page.to_kv.bias[:width] *= 10


@pytest.mark.parametrize("qk_norm", [True, False])
def test_only_with_qk_norm_the_size_of_queries_and_keys_has_no_effect(
    qk_norm: bool, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    config = replace(VIDEO, qk_norm=qk_norm)
    model, inputs = random_model(config), random_inputs(config, frames=3)
    norms = sum(".norm_" in name for name, _ in model.named_parameters())
    # Weight and bias of queries and keys in three attentions; a text's keys are normed once.
    assert norms == (config.depth * 2 * 6 if qk_norm else 0)
    before = inputs.forward(model)
    scale_queries_and_keys(model)
    changed = float((inputs.forward(model) - before).abs().max())
    assert changed < 1e-4 if qk_norm else changed > 1e-2


def test_qk_norm_normalises_each_head_of_its_own(random_model: MakeModel) -> None:
    config = replace(VIDEO, qk_norm=True)
    norm = random_model(config).denoiser.blocks[0].attention.norm_q
    x = torch.randn(2, 3, config.heads, 5, config.head_width)
    with torch.no_grad():
        ours = norm(x)
        expected = layer_norm(x) * norm.weight + norm.bias
    assert norm.weight.shape == (config.head_width,)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("normed", [True, False])
def test_cross_attention_asks_with_the_stream_normalised_or_as_it_is(
    normed: bool, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    config = replace(TINY, cross_attention_norm=normed)
    model, inputs = random_model(config), random_inputs(config)
    asked: list[Tensor] = []
    model.denoiser.blocks[1].cross.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    inputs.forward(model)
    mean, deviation = asked[0].mean(-1), asked[0].std(-1, unbiased=False)
    is_normed = bool((mean.abs() < 1e-5).all() and ((deviation - 1).abs() < 1e-3).all())
    assert is_normed == normed
