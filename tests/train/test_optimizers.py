"""Muon moves the blocks' matrices, AdamW the rest, and nothing moves twice or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.optimizers import ADAMW, MUON, OPTIMIZERS, optimizers, step_all
from gentron.train.video import video_config

SMALL = video_config(
    replace(EMOJI.transformer, width=32, depth=2, mlp_width=64, heads=2, sample_height=4,
            sample_width=4)
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GenTron(SMALL).initialise()


def named(model, optimizer):
    places = {id(p): name for name, p in model.named_parameters()}
    return {places[id(p)] for group in optimizer.param_groups for p in group["params"]}


def test_muon_has_the_matrices_between_hidden_states_and_nothing_else(model):
    adam, muon = optimizers(model, MUON)
    assert isinstance(adam, torch.optim.AdamW)
    hidden = named(model, muon)
    inside = ("attention.to_qkv", "attention.to_out", "cross.to_q", "cross.to_out",
              "temporal.to_q", "temporal.to_k", "temporal.to_v", "temporal.to_out",
              "mlp.up", "mlp.down")  # fmt: skip
    of_blocks = {f"denoiser.blocks.{k}.{part}.weight" for k in range(2) for part in inside}
    texts = {f"text_projection.encoders.0.{k}.to_kv.weight" for k in range(2)}
    assert hidden == of_blocks | texts
    assert named(model, adam) == {name for name, _ in model.named_parameters()} - hidden


def test_adamw_can_have_it_all(model):
    (adam,) = optimizers(model, ADAMW)
    assert named(model, adam) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_moves_every_weight_once_at_the_rate_that_is_given(model, kind):
    torch.manual_seed(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    step_all(optimizers(model, kind), 1e-3)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).detach()
        size = float(moved.square().mean().sqrt())
        # AdamW's first step is the rate; Muon's is told to be 0.2 of it, as AdamW's later ones are.
        expected = 0.2e-3 if name in named(model, optimizers(model, kind)[-1]) else 1e-3
        assert size == pytest.approx(1e-3 if kind == ADAMW else expected, rel=0.35), name


def test_muons_steps_are_equally_long_in_all_directions(model):
    weight = model.denoiser.blocks[0].mlp.up.weight
    before = weight.detach().clone()
    gradient = torch.randn_like(weight)
    gradient[:, :2] *= 100  # a few directions have nearly all of the gradient
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight.grad = gradient.clone()
    step_all(optimizers(model, MUON), 1e-2)
    lengths = torch.linalg.svdvals((weight - before).detach())
    given = torch.linalg.svdvals(gradient)
    assert given[0] / given[-1] > 100
    assert lengths[0] / lengths[-1] < 4
