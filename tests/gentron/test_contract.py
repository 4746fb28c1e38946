"""The table of tensors: names, axes, what smaller models lack, and how feeds are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gentron.config import ModelSpec
from gentron.contract import AXES, COMPUTE, Component, TensorSpec, check_feeds, contract
from gentron.errors import BundleError, RequestError
from gentron.presets import PRESETS, preset

SIZES = {"B": 2, "R": 5, "F": 3, "T": 4, "U": 3, "K": 2, "h": 4, "w": 6, "H": 8, "W": 12}

every_preset = pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())


def components(name: str) -> dict[str, Component]:
    return contract(preset(name).transformer, 8)


def names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


def shape_of(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(SIZES[axis] if isinstance(axis, str) else axis for axis in spec.axes)


def feeds_of(component: Component, compute: str = "float16") -> dict[str, NDArray[Any]]:
    return {
        spec.name: np.zeros(shape_of(spec), spec.numpy_dtype(compute)) for spec in component.inputs
    }


@every_preset
def test_every_preset_has_a_contract_with_names_that_are_used_once(spec: ModelSpec) -> None:
    derived = contract(spec.transformer, 8)
    assert list(derived) == [component.name for component in derived.values()]
    assert list(derived)[-2:] == ["denoiser", "vae_decoder"]
    for component in derived.values():
        given = names((*component.inputs, *component.outputs))
        assert component.inputs
        assert component.outputs
        assert len(given) == len(set(given)), component.name


@every_preset
def test_a_symbolic_axis_is_a_letter_of_the_table_and_a_fixed_one_is_positive(
    spec: ModelSpec,
) -> None:
    for component in contract(spec.transformer, 8).values():
        for tensor in (*component.inputs, *component.outputs):
            for axis in tensor.axes:
                assert axis in AXES if isinstance(axis, str) else axis >= 1, (component, tensor)
            assert tensor.dtype == COMPUTE or np.dtype(tensor.dtype).name == tensor.dtype


@every_preset
def test_what_the_run_once_parts_make_is_what_the_denoiser_reads(spec: ModelSpec) -> None:
    """Same names, types and axes, so that an output is bound as an input without a conversion."""
    derived = contract(spec.transformer, 8)
    inputs = {tensor.name: tensor for tensor in derived["denoiser"].inputs}
    made = list(derived["conditioner"].outputs)
    if "text_projection" in derived:
        made += derived["text_projection"].outputs
    for tensor in made:
        assert inputs[tensor.name] == tensor
    tables = {name for name in inputs if name.startswith(("text_", "modulation", "final_"))}
    assert tables == set(names(tuple(made)))


@every_preset
def test_the_encoders_give_what_the_run_once_parts_read(spec: ModelSpec) -> None:
    derived, config = contract(spec.transformer, 8), spec.transformer
    for index, text in enumerate(config.text):
        encoder = derived["text_encoder" if index == 0 else f"text_encoder_{index + 1}"]
        hidden = encoder.tensor("hidden")
        if "text_projection" in derived:
            assert derived["text_projection"].tensor(f"hidden_{index + 1}").axes == hidden.axes
        assert ("pooled" in names(encoder.outputs)) == text.gives_pooled
        if text.gives_pooled:
            pooled = derived["conditioner"].tensor("pooled")
            assert pooled.axes[1:] == encoder.tensor("pooled").axes[1:]


@every_preset
def test_the_state_that_comes_out_can_go_in_again(spec: ModelSpec) -> None:
    denoiser = contract(spec.transformer, 8)["denoiser"]
    before, after = denoiser.tensor("state"), denoiser.tensor("next_state")
    assert (before.dtype, before.axes) == (after.dtype, after.axes)
    assert denoiser.tensor("noise").axes == (before.axes[0], *before.axes[2:])


# --- what a smaller model does without ---


def test_text_by_adaln_alone_has_no_text_rows_no_tables_and_no_projection() -> None:
    derived = components("tiny-clip-adaln")
    assert list(derived) == ["text_encoder", "conditioner", "denoiser", "vae_decoder"]
    assert names(derived["denoiser"].inputs) == [
        *("state", "row_sample", "row_modulation", "slots", "guidance", "update", "noise"),
        *("modulation", "final_modulation"),
    ]
    assert names(derived["conditioner"].inputs) == ["timesteps", "pooled"]


def test_only_a_video_model_has_motion_free_rows() -> None:
    image, video = components("tiny")["denoiser"], components("tiny-video")["denoiser"]
    assert set(names(video.inputs)) - set(names(image.inputs)) == {"row_motion_free"}
    assert set(names(image.inputs)) < set(names(video.inputs))
    assert video.tensor("row_motion_free") == TensorSpec("row_motion_free", "bool", ("R",))


def test_t5_alone_has_one_table_over_all_blocks() -> None:
    derived, config = components("tiny-t5"), preset("tiny-t5").transformer
    assert "text_encoder_2" not in derived
    tables = [name for name in names(derived["denoiser"].inputs) if name.startswith("text_")]
    assert tables == ["text_kv_1", "text_bias_1"]
    assert derived["denoiser"].tensor("text_kv_1").axes == ("U", config.depth, 2, 4, 24, 16)
    assert derived["text_encoder"].tensor("hidden").axes == ("U", 24, 48)


def test_two_encoders_share_the_blocks_in_turn() -> None:
    """Appendix A: of 3 blocks the first and last read CLIP, the second reads T5."""
    denoiser = components("tiny")["denoiser"]
    assert denoiser.tensor("text_kv_1").axes == ("U", 2, 2, 4, 16, 16)
    assert denoiser.tensor("text_kv_2").axes == ("U", 1, 2, 4, 24, 16)
    assert denoiser.tensor("text_bias_2").axes == ("U", 1, 1, 24)


def test_a_model_without_pooled_text_is_conditioned_on_time_alone() -> None:
    config = preset("tiny-t5").transformer
    config = replace(config, text=(replace(config.text[0], gives_pooled=False),))
    derived = contract(config, 8)
    assert names(derived["conditioner"].inputs) == ["timesteps"]
    assert names(derived["text_encoder"].outputs) == ["hidden"]


@pytest.mark.parametrize("factor", [0, -8])
def test_an_autoencoder_that_does_not_scale_is_refused(factor: int) -> None:
    with pytest.raises(BundleError, match=f"factor must be at least 1, got {factor}"):
        contract(preset("tiny").transformer, factor)


def test_a_contract_is_the_same_after_json() -> None:
    for component in components("tiny-video").values():
        stored = json.loads(json.dumps(component.to_dict()))
        assert set(stored) == {"inputs", "outputs"}
        for key in stored:
            again = tuple(
                TensorSpec(t["name"], t["dtype"], tuple(t["axes"])) for t in stored[key]
            )  # fmt: skip
            assert again == getattr(component, key)


def test_a_graph_lies_beside_its_weights_and_says_its_precision() -> None:
    files = [component.graph_file("fp16") for component in components("tiny").values()]
    assert files == [
        *("text_encoder/model.fp16.onnx", "text_encoder_2/model.fp16.onnx"),
        *("transformer/text_projection.fp16.onnx", "transformer/conditioner.fp16.onnx"),
        *("transformer/denoiser.fp16.onnx", "vae/decoder.fp16.onnx"),
    ]


# --- feeds ---


@pytest.mark.parametrize("name", ["tiny-video", "tiny-clip-adaln", "xl2"])
@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_right_feeds_give_the_size_of_every_axis(name: str, compute: str) -> None:
    for component in components(name).values():
        axes = {a for spec in component.inputs for a in spec.axes if isinstance(a, str)}
        sizes = check_feeds(component, feeds_of(component, compute), compute)
        assert sizes == {axis: SIZES[axis] for axis in axes}


def wrong(name: str, value: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Right feeds of the video denoiser but for one."""
    feeds = feeds_of(components("tiny-video")["denoiser"])
    if value is None:
        del feeds[name]
    else:
        feeds[name] = value
    return feeds


LATENTS = (SIZES["F"], 4, SIZES["h"], SIZES["w"])
WRONG: list[tuple[str, NDArray[Any] | None, str, str]] = [
    ("row_text", None, "denoiser", r"inputs missing \['row_text'\], unknown \[\]"),
    ("row_txt", np.zeros(5, np.int64), "denoiser", r"missing \[\], unknown \['row_txt'\]"),
    ("row_text", np.zeros((5, 1), np.int64), "denoiser.row_text", r"expected axes .* \(5, 1\)"),
    ("row_text", np.zeros(6, np.int64), "denoiser.row_text", r"axis R must be 5, .* \(6,\)"),
    ("noise", np.zeros((2, 3, 4, 6, 4), np.float32), "denoiser.noise", "axis h must be 4"),
    ("slots", np.zeros((2, 2), np.int64), "denoiser.slots", r"axis 3 must be 3, .* \(2, 2\)"),
    ("row_text", np.zeros(5, np.int32), "denoiser.row_text", "expected int64, got int32"),
    ("row_motion_free", np.zeros(5, np.uint8), "denoiser.row_motion_free", "expected bool"),
    ("guidance", np.zeros((2, 3)), "denoiser.guidance", "expected float32, got float64"),
    (
        "modulation",
        np.zeros((4, 3, 6, 64), np.float32),
        "denoiser.modulation",
        "expected float16, got float32",
    ),
    (
        "noise",
        np.zeros((*LATENTS[::-1], 2), np.float32).T,
        "denoiser.noise",
        "must be C-contiguous",
    ),
]


@pytest.mark.parametrize(("name", "value", "field", "message"), WRONG)
def test_a_wrong_feed_is_refused_by_the_name_of_its_tensor(
    name: str, value: NDArray[Any] | None, field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_feeds(components("tiny-video")["denoiser"], wrong(name, value), "float16")
    assert caught.value.field == field


def test_the_compute_type_is_the_graphs_own() -> None:
    denoiser = components("tiny")["denoiser"]
    feeds = feeds_of(denoiser, "float16")
    with pytest.raises(RequestError, match=r"denoiser\.modulation: expected float32, got float16"):
        check_feeds(denoiser, feeds, "float32")
