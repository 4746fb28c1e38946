"""The reference network: what is zero when fresh, how text enters, and that nothing is dead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.model.gentron import ZERO_INITIALISED
from gentron.model.text_encoder import TextEncoder, encoder_config
from gentron.presets import preset

MakeModel = Callable[[GenTronConfig], GenTron]
MakeInputs = Callable[..., Any]

TINY, VIDEO = preset("tiny").transformer, preset("tiny-video").transformer
TABLE_2 = ("tiny-clip-adaln", "tiny-clip", "tiny-t5", "tiny")
NETWORKS = (*TABLE_2, "tiny-video", "emoji")


# --- a fresh network ---


@pytest.fixture
def fresh() -> GenTron:
    torch.manual_seed(0)
    return GenTron(VIDEO).initialise().eval()


def test_a_fresh_network_predicts_zero(fresh: GenTron, random_inputs: MakeInputs) -> None:
    inputs = random_inputs(VIDEO, frames=3)
    assert not inputs.forward(fresh).any()


def test_a_fresh_block_is_the_identity(fresh: GenTron, random_inputs: MakeInputs) -> None:
    inputs = random_inputs(VIDEO)
    modulation, _, text = inputs.tables(fresh)
    assert not modulation.any()
    x, code = torch.randn(2, 3, 6, VIDEO.width), torch.randn(3, 1, VIDEO.width)
    for index, block in enumerate(fresh.denoiser.blocks):
        table, bias = text[index % 2]
        with torch.no_grad():
            page = table[:, index // 2], bias
            assert torch.equal(block(x, modulation[:, index], page, (code, torch.zeros(()))), x)
            assert not block.cross(x, *page).any()
            assert not block.temporal(x, code, torch.zeros(())).any()
            assert block.attention(x).any()  # behind a gate, so free to be anything
            assert block.mlp(x).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_zero_when_fresh_is_what_the_pattern_matches(name: str) -> None:
    """Export fills these with noise in a model without weights, so the two may not drift apart."""
    model = GenTron(preset(name).transformer).initialise()
    named = dict(model.named_parameters())
    matched = {n for n in named if ZERO_INITIALISED.search(n)}
    matrices = {n for n, p in named.items() if p.dim() > 1}
    assert {n for n in matrices if not named[n].any()} == matched & matrices
    assert not any(named[n].any() for n in matched)
    zeroed = {id(p) for layer in model.zero_initialised() for p in layer.parameters()}
    assert {n for n, p in named.items() if id(p) in zeroed} == matched


# --- text ---


@pytest.mark.parametrize("name", TABLE_2)
def test_each_text_variant_of_table_2_runs_from_its_own_encoders(
    name: str, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """And its output depends on the prompt, on the time and on the latents."""
    spec, outputs = preset(name), {}
    config = spec.transformer
    model, inputs = random_model(config), random_inputs(config, rows=1)
    torch.manual_seed(1)
    pairs = zip(config.text, spec.encoders, strict=True)
    encoders = [TextEncoder(text, encoder_config(values)).eval() for text, values in pairs]
    for prompt in ([5, 6, 7], [5, 9, 7]):
        for index, encoder in enumerate(encoders):
            ids = torch.full((1, config.text[index].max_tokens), 258)
            ids[0, :3] = torch.tensor(prompt)
            with torch.no_grad():
                hidden, *pooled = encoder(ids, (ids != 258).long())
            inputs.hidden[index] = hidden
            if pooled:
                inputs.pooled = pooled[0]
        outputs[str(prompt)] = inputs.forward(model)
    outputs["time"] = replace(inputs, timesteps=inputs.timesteps + 100).forward(model)
    outputs["latents"] = replace(inputs, latents=inputs.latents + 1).forward(model)
    assert all(output.shape == inputs.latents.shape for output in outputs.values())
    assert all(output.isfinite().all() for output in outputs.values())
    assert all(output.dtype == torch.float32 for output in outputs.values())
    reference = outputs.pop("[5, 9, 7]")
    for what, output in outputs.items():
        assert (output - reference).abs().max() > 1e-4, what


def block_outputs(model: GenTron, run: Callable[[GenTron], Tensor]) -> list[Tensor]:
    """Every block's output, then the network's."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
        for block in model.denoiser.blocks
    ]
    out = run(model)
    for hook in hooks:
        hook.remove()
    return [*seen, out]


@pytest.mark.parametrize(("encoder", "first"), [(0, 0), (1, 1)])
def test_an_encoder_enters_through_its_own_blocks_alone(
    encoder: int, first: int, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """Appendix A: CLIP in blocks 0, 2, ...; T5 in 1, 3, ..., so none of it reaches block 0."""
    model, inputs = random_model(TINY), random_inputs(TINY)
    before = block_outputs(model, inputs.forward)
    inputs.hidden[encoder] = inputs.hidden[encoder] + 1
    after = block_outputs(model, inputs.forward)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [index >= first for index in range(TINY.depth + 1)]


@pytest.mark.parametrize(("encoder", "page"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
def test_every_page_of_keys_and_values_is_read_by_its_own_block(
    encoder: int, page: int, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    config = replace(TINY, depth=5)
    model, inputs = random_model(config), random_inputs(config, rows=3)
    before = block_outputs(model, inputs.forward)
    with torch.no_grad():
        model.text_projection.encoders[encoder][page].to_kv.weight.mul_(1.5)
    after = block_outputs(model, inputs.forward)
    first = encoder + 2 * page
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [index >= first for index in range(config.depth + 1)]


@pytest.mark.parametrize(("encoder", "attended"), [(0, True), (1, False)])
def test_padding_matters_only_where_it_is_attended(
    encoder: int, attended: bool, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    model, inputs = random_model(TINY), random_inputs(TINY)
    assert TINY.text[encoder].attend_padding == attended
    before = inputs.forward(model)
    padding = (inputs.mask[encoder] == 0)[..., None]
    assert padding.any()
    inputs.hidden[encoder] = inputs.hidden[encoder] + 9.0 * padding
    assert torch.equal(inputs.forward(model), before) != attended


def test_a_model_without_cross_attention_reads_pooled_text_alone(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    config = preset("tiny-clip-adaln").transformer
    model, inputs = random_model(config), random_inputs(config)
    before = inputs.forward(model)
    inputs.hidden[0] = inputs.hidden[0] + 1
    assert torch.equal(inputs.forward(model), before)
    inputs.pooled = inputs.pooled + 1
    assert not torch.equal(inputs.forward(model), before)


# --- the split into what changes when ---


def test_rows_that_share_pages_of_the_tables_equal_rows_with_their_own(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """denoise(latents, condition(t, pooled), project(tokens)), pages in any order and reused."""
    model, distinct = random_model(VIDEO), random_inputs(VIDEO, rows=3)
    row_modulation, row_text = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([1, 1, 0, 2, 0])
    free = torch.tensor([True, False, False, True, False])
    rows = random_inputs(VIDEO, rows=5, frames=2, seed=1)
    rows.timesteps, rows.pooled = (
        distinct.timesteps[row_modulation],
        distinct.pooled[row_modulation],
    )
    rows.hidden = [hidden[row_text] for hidden in distinct.hidden]
    rows.mask = [mask[row_text] for mask in distinct.mask]
    modulation, final, text = distinct.tables(model)
    with torch.no_grad():
        paged = model.denoiser.predict(
            rows.latents, modulation, final, row_modulation, row_text, free, text
        )
    torch.testing.assert_close(paged, rows.forward(model, free), rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    model, inputs = random_model(TINY), random_inputs(TINY, rows=3)
    together = inputs.forward(model)
    for row in range(3):
        part = slice(row, row + 1)
        single = replace(
            inputs,
            latents=inputs.latents[part],
            timesteps=inputs.timesteps[part],
            hidden=[hidden[part] for hidden in inputs.hidden],
            mask=[mask[part] for mask in inputs.mask],
            pooled=inputs.pooled[part],
        )
        torch.testing.assert_close(single.forward(model)[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_small_parts_and_the_output_stay_float32(
    dtype: torch.dtype, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    full, inputs = random_model(TINY), random_inputs(TINY)
    torch.set_default_dtype(dtype)
    try:
        half = GenTron(TINY).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    half.load_state_dict(full.state_dict())
    islands = "conditioner.time", "conditioner.text", "conditioner.final", "denoiser.final"
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(islands) else dtype), name
    output, expected = inputs.forward(half), inputs.forward(full)
    assert output.dtype == torch.float32
    digits = 2e-2 if dtype == torch.float16 else 1.5e-1  # 11 and 8 bits, summed over the depth
    assert (output - expected).abs().max() < digits * expected.abs().max()


# --- learning ---

# These add the same number to every score of a query, which softmax ignores.
WITHOUT_EFFECT = ("temporal.to_k.bias", "norm_k.bias")


def gradients(model: GenTron, inputs: Any) -> dict[str, float]:
    """Largest gradient of each parameter for a mean squared error."""
    model.zero_grad(set_to_none=True)
    latents, arguments = inputs.latents, (inputs.hidden, inputs.mask, inputs.pooled)
    loss = (model(latents, inputs.timesteps, *arguments) - latents).square().mean()
    loss.backward()
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().max())
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_takes_part_in_the_output(
    name: str, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    config = preset(name).transformer
    model, inputs = random_model(config), random_inputs(config, rows=3, frames=3)
    found = gradients(model, inputs)
    largest = max(found.values())
    dead = {n for n, value in found.items() if value < 1e-6 * largest}
    assert {n for n in dead if not n.endswith(WITHOUT_EFFECT)} == set()


def test_a_fresh_video_network_trains_all_its_parameters_within_four_steps(
    fresh: GenTron, random_inputs: MakeInputs
) -> None:
    """One step opens the last layer, the next the gates and outputs, then what lies behind."""
    inputs, start = random_inputs(VIDEO, rows=3, frames=3), copy.deepcopy(fresh.state_dict())
    optimiser = torch.optim.AdamW(fresh.parameters(), lr=1e-2, weight_decay=0.0)
    first = {n for n, value in gradients(fresh, inputs).items() if value}
    assert first == {"denoiser.final.weight", "denoiser.final.bias"}
    for _ in range(4):
        optimiser.step()
        gradients(fresh, inputs)
    still = {n for n, p in fresh.named_parameters() if torch.equal(p, start[n])}
    assert {n for n in still if not n.endswith(WITHOUT_EFFECT)} == set()
