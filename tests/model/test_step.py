"""One sampling step: guidance (equation 6) and the solver as data, over rows of many requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.contract import contract
from gentron.guidance import guidance_branches
from gentron.model import GenTron
from gentron.presets import preset

MakeModel = Callable[[GenTronConfig], GenTron]
MakeInputs = Callable[..., Any]
VIDEO = preset("tiny-video").transformer
NAN, INFINITY = float("nan"), float("inf")


@dataclass
class Step:
    """Arguments of `Denoiser.forward`, by name."""

    state: Tensor
    row_sample: Tensor
    row_modulation: Tensor
    row_text: Tensor | None
    row_motion_free: Tensor | None
    slots: Tensor
    guidance: Tensor
    update: Tensor
    noise: Tensor
    modulation: Tensor
    final_modulation: Tensor
    text_tables: list[tuple[Tensor, Tensor]]

    def run(self, model: GenTron) -> tuple[Tensor, Tensor]:
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        with torch.no_grad():
            next_state, bad = model.denoiser(**arguments)
        return next_state, bad


@pytest.fixture
def model(random_model: MakeModel) -> GenTron:
    return random_model(VIDEO)


@pytest.fixture
def step(model: GenTron, random_inputs: MakeInputs) -> Step:
    """Three samples with three, one and two branches; rows in no order, pages shared.

    Rows 0 to 5 are of samples 0, 2, 0, 1, 2, 0. Page 4 of the modulation is read by none, page 3
    by sample 1 alone; page 1 of the texts by samples 0 and 2, page 2 by sample 1 alone.
    """
    pages, g = random_inputs(VIDEO, rows=5), torch.Generator().manual_seed(5)
    modulation, final, text = pages.tables(model)
    weights = [
        [branch.weight for branch in guidance_branches(*scales, moving=True)]
        for scales in ((7.5, 1.3), (1.0, 1.0), (4.0, 1.0))
    ]
    latents = (2, VIDEO.latent_channels, 4, 6)
    return Step(
        state=torch.randn(3, 3, *latents, generator=g),
        row_sample=torch.tensor([0, 2, 0, 1, 2, 0]),
        row_modulation=torch.tensor([0, 2, 0, 3, 1, 1]),
        row_text=torch.tensor([0, 1, 1, 2, 0, 1]),
        row_motion_free=torch.tensor([True, False, False, False, False, False]),
        slots=torch.tensor([[0, 2, 5], [3, 3, 3], [4, 1, 4]]),
        guidance=torch.tensor([row + [0.0] * (3 - len(row)) for row in weights]),
        update=torch.randn(3, 3, 5, generator=g),
        noise=torch.randn(3, *latents, generator=g),
        modulation=modulation,
        final_modulation=final,
        text_tables=[(table[:3].clone(), bias[:3].clone()) for table, bias in text],
    )


def test_a_step_is_equation_6_and_the_solvers_matrix_written_out(
    model: GenTron, step: Step
) -> None:
    with torch.no_grad():
        output = model.denoiser.predict(
            step.state[step.row_sample, 0],
            *(step.modulation, step.final_modulation, step.row_modulation),
            *(step.row_text, step.row_motion_free, step.text_tables),
        )
    e, state = output.double().numpy(), step.state.double().numpy()
    noise, update = step.noise.double().numpy(), step.update.double().numpy()
    predictions = [
        e[0] + 7.5 * (e[5] - e[2]) + 1.3 * (e[2] - e[0]),  # lambda_T = 7.5, lambda_M = 1.3
        e[3],  # both 1: the prompt with motion, alone
        e[4] + 4.0 * (e[1] - e[4]),  # lambda_M = 1: classifier-free guidance
    ]
    next_state, bad = step.run(model)
    assert next_state.shape == step.state.shape
    for sample, prediction in enumerate(predictions):
        terms = [*state[sample], prediction, noise[sample]]
        for slot in range(3):
            expected = sum(update[sample, slot, j] * terms[j] for j in range(5))
            # eq. 6 multiplies rounding by 14, the matrix by a few.
            np.testing.assert_allclose(next_state[sample, slot].numpy(), expected, atol=2e-4)
    assert bad.tolist() == [False, False, False]


def test_samples_of_one_call_equal_calls_of_their_own(model: GenTron, step: Step) -> None:
    together, _ = step.run(model)
    for sample, rows in enumerate(([0, 2, 5], [3], [4, 1])):
        only = torch.tensor(rows)
        assert step.row_text is not None
        assert step.row_motion_free is not None
        one = slice(sample, sample + 1)
        single = replace(
            step,
            **{name: getattr(step, name)[one] for name in ("state", "guidance", "update", "noise")},
            row_sample=torch.zeros(len(rows), dtype=torch.long),
            row_modulation=step.row_modulation[only],
            row_text=step.row_text[only],
            row_motion_free=step.row_motion_free[only],
            slots=torch.tensor([[*range(len(rows)), 0, 0][:3]]),
        )
        next_state, _ = single.run(model)
        torch.testing.assert_close(next_state[0], together[sample], rtol=0, atol=2e-4)


def test_a_slot_of_weight_0_adds_nothing(model: GenTron, step: Step) -> None:
    before, _ = step.run(model)
    step.slots = torch.tensor([[0, 2, 5], [3, 0, 5], [4, 1, 2]])
    after, _ = step.run(model)
    assert torch.equal(before, after)


def test_an_update_that_is_the_identity_leaves_the_state_alone(model: GenTron, step: Step) -> None:
    """How a finished sample waits for the others."""
    step.update[1] = torch.eye(3, 5)
    next_state, _ = step.run(model)
    assert torch.equal(next_state[1], step.state[1])


# --- what is not finite stays where it is ---


def poison_latents(step: Step) -> None:
    step.state[1, 0, 0, 0, 0, 0] = NAN


def poison_memory(step: Step) -> None:
    step.state[1, 2, 1, 3, 3, 5] = INFINITY


def poison_noise(step: Step) -> None:
    step.noise[1, 0, 2, 1, 1] = NAN


def poison_modulation(step: Step) -> None:
    step.modulation[3, 1, 2, 7] = NAN


def poison_final_modulation(step: Step) -> None:
    step.final_modulation[3, 0, 9] = INFINITY


def poison_text(step: Step) -> None:
    step.text_tables[1][0][2, 0, 1, 0, 0, 0] = NAN


def poison_weights(step: Step) -> None:
    step.guidance[1, 0] = INFINITY


POISONS = [
    *(poison_latents, poison_memory, poison_noise, poison_modulation),
    *(poison_final_modulation, poison_text, poison_weights),
]


@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_marks_its_own_sample_and_no_bit_of_another(
    poison: Callable[[Step], None], model: GenTron, step: Step
) -> None:
    clean, _ = step.run(model)
    poison(step)
    next_state, bad = step.run(model)
    assert bad.tolist() == [False, True, False]
    assert not next_state[1].isfinite().all()
    for sample in (0, 2):
        assert torch.equal(next_state[sample], clean[sample])


def test_pages_that_no_row_reads_may_hold_anything(model: GenTron, step: Step) -> None:
    """Tables are allocated once and pages reused, so the rest of them is whatever was there."""
    clean, _ = step.run(model)
    step.modulation[4], step.final_modulation[4] = NAN, NAN
    step.text_tables = [
        (torch.cat([table, torch.full_like(table[:1], NAN)]), torch.cat([bias, bias[:1] + NAN]))
        for table, bias in step.text_tables
    ]
    next_state, bad = step.run(model)
    assert torch.equal(next_state, clean)
    assert not bad.any()


# --- names ---


@pytest.mark.parametrize("name", ["tiny", "tiny-video", "tiny-clip-adaln"])
def test_a_steps_arguments_are_the_contracts_inputs(name: str) -> None:
    inputs = [spec.name for spec in contract(preset(name).transformer, 2)["denoiser"].inputs]
    plain = [field for field in inputs if not field.startswith(("text_kv_", "text_bias_"))]
    known = [field.name for field in fields(Step)]
    assert [field for field in known if field in plain] == plain
    assert set(known) - set(plain) <= {"row_text", "row_motion_free", "text_tables"}
