"""Temporal attention (equations 3 to 5), the motion-free mask, and video from an image model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gentron.config import GenTronConfig
from gentron.model import GenTron
from gentron.model.denoiser import frame_code, motion_bias
from gentron.model.layers import TemporalAttention, layer_norm
from gentron.presets import preset

MakeModel = Callable[[GenTronConfig], GenTron]
MakeInputs = Callable[..., Any]
Array = NDArray[np.float64]

TINY, VIDEO = preset("tiny").transformer, preset("tiny-video").transformer
FRAMES = 4
CODE = frame_code(torch.arange(FRAMES), VIDEO.width).double()


# --- the layer ---


@pytest.fixture(params=[False, True], ids=["codes ask", "codes answer too"])
def layer(random_model: MakeModel, request: pytest.FixtureRequest) -> TemporalAttention:
    """One with weights of order 1 in float64."""
    config = replace(VIDEO, frame_values=request.param)
    found = copy.deepcopy(random_model(config).denoiser.blocks[0].temporal).double()
    with torch.no_grad():
        found.to_out.weight.mul_(50 / VIDEO.width**0.5)
    return found


def tokens(frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, frames, 6, VIDEO.width, dtype=torch.float64, generator=generator)


def linear(layer: torch.nn.Linear, x: Array) -> Array:
    return np.asarray(x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())


def free(*rows: bool, frames: int = FRAMES) -> Tensor:
    return motion_bias(torch.tensor(rows), frames, torch.float64)


def test_temporal_attention_is_softmax_over_frames_of_one_place(layer: TemporalAttention) -> None:
    """Equation 4 for each row, place and head; the frame codes are in queries and keys, and in the
    values, if at all, as the difference to that of the frame that asks."""
    x, code = tokens(), CODE
    with torch.no_grad():
        ours = layer(x, code, free(False, False)).numpy()
    placed, heads, width = x.numpy() + code.numpy(), VIDEO.heads, VIDEO.head_width
    q, k = linear(layer.to_q, placed), linear(layer.to_k, placed)
    out = np.empty(x.shape)
    for row, place, head in np.ndindex(2, 6, heads):
        part = (row, slice(None), place, slice(head * width, (head + 1) * width))
        scores = np.exp(q[part] @ k[part].T / np.sqrt(width))
        for frame in range(FRAMES):
            seen = x.numpy()[row, :, place]
            if layer.frame_values:
                seen = seen + code.numpy()[:, 0] - code.numpy()[frame]
            v = linear(layer.to_v, seen)[:, part[-1]]
            weights = scores[frame] / scores[frame].sum()
            out[row, frame, place, part[-1]] = weights @ v
    # The softmax is float32 in every precision: eps 6e-8 times a sum over 64 values.
    np.testing.assert_allclose(ours, linear(layer.to_out, out), rtol=0, atol=5e-6)


def test_frames_that_are_alike_know_which_they_are_if_codes_are_in_the_values(
    layer: TemporalAttention,
) -> None:
    """All there is to tell them apart at the start of sampling, where every frame is noise."""
    x = tokens()[:, :1].expand(-1, FRAMES, -1, -1)
    with torch.no_grad():
        out = layer(x, CODE, free(False, False))
    spread = float((out - out[:, :1]).abs().max())
    if layer.frame_values:
        assert spread > 1
    else:
        assert spread < 1e-5


def test_motion_free_attention_is_one_map_for_every_token(layer: TemporalAttention) -> None:
    """Softmax is exactly 1 on the diagonal of the identity mask: W_o (W_v x + b_v) + b_o."""
    x = tokens()
    expected = linear(layer.to_out, linear(layer.to_v, x.numpy()))
    with torch.no_grad():
        ours = layer(x, CODE, free(True, True)).numpy()
        alone = layer(x[:, :1], CODE[:1], free(False, False, frames=1)).numpy()
        short = layer(x[:, :1], CODE[:1], None).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(alone, expected[:, :1], rtol=0, atol=1e-12)  # F = 1 is that map too
    np.testing.assert_allclose(short, alone, rtol=0, atol=1e-12)


def test_the_motion_free_mask_is_the_identity_in_its_own_rows_alone() -> None:
    bias = motion_bias(torch.tensor([True, False]), 3, torch.float32)
    assert bias.shape == (2, 1, 1, 3, 3)
    assert torch.equal(bias[0, 0, 0] == 0, torch.eye(3, dtype=torch.bool))
    assert not bias[1].any()
    assert torch.equal(bias[0, 0, 0].softmax(-1), torch.eye(3))
    half = motion_bias(torch.tensor([True]), 3, torch.float16)
    assert torch.equal(half[0, 0, 0].softmax(-1), torch.eye(3).half())


# --- the network ---


def predict(model: GenTron, inputs: Any, motion_free: list[bool]) -> Tensor:
    """The token path in float64; conditioning is float32 by design and converted."""
    modulation, final, text = inputs.tables(model)
    rows = torch.arange(inputs.latents.shape[0])
    with torch.no_grad():
        output: Tensor = (
            copy.deepcopy(model.denoiser)
            .double()
            .predict(
                inputs.latents.double(),
                modulation.double(),
                final.double(),
                rows,
                rows,
                torch.tensor(motion_free) if model.config.temporal else None,
                [(table.double(), bias.double()) for table, bias in text],
            )
        )
    return output


def frame_of(inputs: Any, frame: int) -> Any:
    return replace(inputs, latents=inputs.latents[:, frame : frame + 1])


# Softmax and the last layer are float32 even in a float64 network.
TAIL = 1e-5


def test_motion_free_frames_are_images_of_their_own(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    model, inputs = random_model(VIDEO), random_inputs(VIDEO, frames=FRAMES)
    together = predict(model, inputs, [True, True])
    for frame in range(FRAMES):
        for motion_free in ([True, True], [False, False]):  # of one frame, no difference
            single = predict(model, frame_of(inputs, frame), motion_free)
            torch.testing.assert_close(single[:, 0], together[:, frame], rtol=0, atol=TAIL)
    assert (predict(model, inputs, [False, False]) - together).abs().max() > 100 * TAIL


def test_a_frame_reaches_the_others_only_with_motion(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """Rows of both kinds in one call; the last frame changes in both."""
    model, inputs = random_model(VIDEO), random_inputs(VIDEO, frames=FRAMES)
    before = predict(model, inputs, [True, False])
    inputs.latents = inputs.latents.clone()
    inputs.latents[:, -1] += 1
    after = predict(model, inputs, [True, False])
    changed = (after != before).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, False, False, True], [True, True, True, True]]


def test_the_order_of_frames_matters_only_with_motion(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    model, inputs = random_model(VIDEO), random_inputs(VIDEO, frames=FRAMES)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(inputs, latents=inputs.latents[:, order])
    before = predict(model, inputs, [True, False])[:, order]
    difference = (predict(model, shuffled, [True, False]) - before).flatten(1).abs().amax(1)
    assert difference[0] < TAIL
    assert difference[1] > 100 * TAIL  # the frame code


def test_frames_may_be_some_of_a_clip_at_their_places(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """Frames carry their places with them, so their order is free; which places counts."""
    model, inputs = random_model(VIDEO), random_inputs(VIDEO, frames=FRAMES)

    def at(chosen: list[int], places: list[int] | None) -> Tensor:
        where = None if places is None else torch.tensor(places)
        with torch.no_grad():
            found: Tensor = model(inputs.latents[:, chosen], inputs.timesteps, inputs.hidden,
                                  inputs.mask, inputs.pooled, frame_places=where)  # fmt: skip
        return found

    plain, order = at([0, 1, 2, 3], None), [2, 0, 3, 1]
    assert torch.equal(at([0, 1, 2, 3], [0, 1, 2, 3]), plain)
    torch.testing.assert_close(at(order, order), plain[:, order], rtol=0, atol=10 * TAIL)
    assert (at([0, 3], [0, 3]) - at([0, 3], [0, 1])).abs().max() > 100 * TAIL


@pytest.mark.parametrize("motion_free", [True, False])
def test_a_video_model_fresh_from_an_image_model_draws_its_frames(
    motion_free: bool, random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """Equation 5 starts as the identity, since the temporal output is zero."""
    image, video = random_model(TINY), GenTron(VIDEO).initialise().eval()
    loaded = video.load_state_dict(image.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys
    assert all(".temporal." in name for name in loaded.missing_keys)
    inputs = random_inputs(TINY, frames=FRAMES)
    drawn = inputs.forward(video, torch.tensor([motion_free] * 2))
    assert drawn.abs().max() > 0.1
    assert torch.equal(drawn, inputs.forward(image))
    for frame in range(FRAMES):
        single = frame_of(inputs, frame).forward(image)
        torch.testing.assert_close(drawn[:, frame], single[:, 0], rtol=0, atol=TAIL)


def test_motion_is_on_unless_asked_for(random_model: MakeModel, random_inputs: MakeInputs) -> None:
    model, inputs = random_model(VIDEO), random_inputs(VIDEO, frames=FRAMES)
    assert torch.equal(inputs.forward(model), inputs.forward(model, torch.tensor([False, False])))


def test_the_layer_reads_the_stream_normalised_and_adds_to_it(random_model: MakeModel) -> None:
    """Equations 3 to 5: after cross-attention, x + TempSelfAttn(LN(x)), before the MLP."""
    block = random_model(VIDEO).denoiser.blocks[0].double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("cross", "temporal", "mlp"):
        getattr(block, name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (given[0], out)})
        )
    modulation = torch.zeros(2, 6, VIDEO.width, dtype=torch.float64)  # gates closed, MLP unscaled
    keys = torch.randn(2, 2, VIDEO.heads, 5, VIDEO.head_width, dtype=torch.float64)
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        out = block(tokens(), modulation, (keys, bias), (CODE, free(False, True)))
    after_cross = tokens() + seen["cross"][1]
    torch.testing.assert_close(seen["temporal"][0], layer_norm(after_cross))
    torch.testing.assert_close(out, after_cross + seen["temporal"][1])
    torch.testing.assert_close(seen["mlp"][0], layer_norm(out))


def test_images_learn_without_the_attention_that_one_frame_has_no_use_for(
    random_model: MakeModel, random_inputs: MakeInputs
) -> None:
    """In training a frame alone goes through W_o W_v only: same picture, same gradients."""
    model, inputs = copy.deepcopy(random_model(VIDEO)), random_inputs(VIDEO, rows=2, frames=1)
    free = torch.tensor([False, True])

    def gradients(training: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        model.train(training).zero_grad(set_to_none=True)
        hidden, mask, pooled = inputs.hidden, inputs.mask, inputs.pooled
        out = model(inputs.latents, inputs.timesteps, hidden, mask, pooled, free)
        out.square().sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}

    (short, of_short), (whole, of_whole) = gradients(True), gradients(False)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-5)
    for name, grad in of_whole.items():
        found = of_short[name]
        if grad is None or not grad.any():
            assert found is None or not found.any(), name
        elif ".temporal.to_q" in name or ".temporal.to_k" in name or ".temporal.norm_" in name:
            assert found is None, name
            assert grad.abs().max() < 1e-5, name
        else:
            assert found is not None
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-4)
