"""Counted operations against those that torch counts while the network runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gentron.contract import contract
from gentron.model.conditioning import Conditioner, TextProjection
from gentron.model.denoiser import Denoiser
from gentron.presets import PRESETS
from gentron.runtime.cost import conditioner_cost, denoiser_cost, projection_cost

NAMES = ["tiny", "tiny-video", "xl2", "g2", "g2-video", "emoji"]
SIZES = {"B": 2, "R": 3, "F": 1, "T": 3, "U": 2, "h": 16, "w": 8}


def counted(module: torch.nn.Module, *inputs: object) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def elements(module: torch.nn.Module) -> int:
    """Of its matrices; biases and norms are small."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def inputs_of(config, name, sizes):
    component = contract(config, 8)[name]
    kinds = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
    return {
        spec.name: torch.zeros(
            [sizes[a] if isinstance(a, str) else a for a in spec.axes],
            dtype=kinds.get(spec.dtype, torch.float32),
            device="meta",
        )
        for spec in component.inputs
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_what_torch_counts(name):
    config = PRESETS[name].transformer
    sizes = SIZES | {"F": 4 if config.temporal else 1}
    with torch.device("meta"):
        denoiser = Denoiser(config)
    named = inputs_of(config, "denoiser", sizes)
    tables = [
        (named.pop(f"text_kv_{i + 1}"), named.pop(f"text_bias_{i + 1}"))
        for i in range(len(config.text))
        if f"text_kv_{i + 1}" in named
    ]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        denoiser(**({"row_text": None, "row_motion_free": None} | named), text_tables=tables)
    cost = denoiser_cost(config, sizes, 2)
    # The update of the solver is a product too, of 3 by 5 matrices.
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=2e-3)
    stored = 2 * elements(denoiser) + 2 * denoiser.final.weight.numel()  # the tail is float32
    assert cost.weight_bytes == pytest.approx(stored, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_costs_what_torch_counts(name):
    config = PRESETS[name].transformer
    with torch.device("meta"):
        conditioner, projection = Conditioner(config), TextProjection(config)
    given = inputs_of(config, "conditioner", SIZES)
    cost = conditioner_cost(config, SIZES["T"], 2)
    assert cost.flops == pytest.approx(counted(conditioner, *given.values()), rel=1e-3)
    hidden = [torch.zeros(2, t.max_tokens, t.width, device="meta") for t in config.text]
    mask = [torch.zeros(2, t.max_tokens, dtype=torch.int64, device="meta") for t in config.text]
    cost = projection_cost(config, 2, 2)
    assert cost.flops == pytest.approx(counted(projection, hidden, mask), rel=1e-3)
    assert cost.weight_bytes == pytest.approx(2 * elements(projection), rel=1e-2)


def test_the_hot_loop_reads_neither_modulation_nor_text_weights():
    """In G/2 they are 26 and 13 percent of the transformer."""
    config = PRESETS["g2"].transformer
    step = denoiser_cost(config, SIZES, 2).weight_bytes
    condition = conditioner_cost(config, 1, 2).weight_bytes
    text = projection_cost(config, 1, 2).weight_bytes
    total = step + condition + text
    assert condition / total == pytest.approx(0.26, abs=0.01)
    assert text / total == pytest.approx(0.13, abs=0.01)


def test_twice_the_rows_are_twice_the_operations_over_the_same_weights():
    config = PRESETS["g2"].transformer
    one, two = (denoiser_cost(config, SIZES | {"R": r, "B": r}, 2) for r in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.weight_bytes == one.weight_bytes


def test_a_model_without_cross_attention_has_no_text_projection():
    config = replace(PRESETS["tiny"].transformer, injection="adaln")
    assert projection_cost(config, 3, 2).bytes == 0
