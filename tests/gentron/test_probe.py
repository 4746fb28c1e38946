"""Golden probes: inputs that any machine can make again, in range, exact in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gentron.config import GenTronConfig
from gentron.contract import COMPUTE, Component, TensorSpec, check_feeds, contract
from gentron.errors import BundleError
from gentron.presets import PRESETS, preset
from gentron.probe import (
    MASKED,
    ProbeCase,
    in_compute_type,
    load_probes,
    probe_inputs,
    probe_sizes,
    save_probes,
)

Array = NDArray[Any]
NAMES = ("tiny", "tiny-video", "tiny-clip-adaln")
COMPONENTS = [
    pytest.param(preset(name).transformer, component, id=f"{name}-{component.name}")
    for name in NAMES
    for component in contract(preset(name).transformer, 2).values()
]
each_component = pytest.mark.parametrize(("config", "component"), COMPONENTS)


def cases_of(component: Component, config: GenTronConfig, seed: int = 3) -> list[ProbeCase]:
    """One for each size that ships, with made-up prompts where the component reads tokens."""
    cases = []
    for sizes in probe_sizes(component, config):
        tokens: tuple[tuple[int, ...], ...] = ()
        if component.inputs[0].name == "input_ids":
            length = component.inputs[0].axes[1]
            assert isinstance(length, int)
            tokens = (tuple(range(length)),) * sizes["U"]
        cases.append(ProbeCase(seed, sizes, tokens, tokens))
    return cases


def every_input(component: Component, config: GenTronConfig) -> list[tuple[TensorSpec, Array]]:
    return [
        (spec, probe_inputs(component, case)[spec.name])
        for seed in range(2)
        for case in cases_of(component, config, seed)
        for spec in component.inputs
    ]


@each_component
def test_inputs_are_a_function_of_the_case(config: GenTronConfig, component: Component) -> None:
    for case in cases_of(component, config):
        again = ProbeCase(case.seed, dict(case.sizes), case.token_ids, case.token_mask)
        one, other = probe_inputs(component, case), probe_inputs(component, again)
        assert list(one) == list(other) == [spec.name for spec in component.inputs]
        assert all((one[name] == other[name]).all() for name in one)


@each_component
def test_another_seed_gives_other_inputs(config: GenTronConfig, component: Component) -> None:
    one, other = (probe_inputs(component, cases_of(component, config, s)[0]) for s in (3, 4))
    fixed = {name for name in one if name.startswith(("mask_", "text_bias_"))}
    fixed |= {"input_ids", "attention_mask"}  # they come with the case
    drawn = [spec.name for spec in component.inputs if spec.name not in fixed]
    assert drawn or component.name.startswith("text_encoder")
    for name in drawn:
        assert one[name].size < 8 or not (one[name] == other[name]).all(), name


@each_component
@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_inputs_pass_the_check_that_an_engine_makes(
    config: GenTronConfig, component: Component, compute: str
) -> None:
    for case in cases_of(component, config):
        feeds = in_compute_type(component, probe_inputs(component, case), compute)
        assert check_feeds(component, feeds, compute) == case.sizes


@each_component
def test_the_shapes_that_ship_hold_the_native_size_and_one_of_every_count(
    config: GenTronConfig, component: Component
) -> None:
    cases = probe_sizes(component, config)
    usual, least = cases[0], min(cases, key=lambda case: sum(case.values()))
    axes = {a for spec in component.inputs for a in spec.axes if isinstance(a, str)}
    assert all(set(case) == axes for case in cases)
    assert len({tuple(case.values()) for case in cases}) == len(cases)
    assert usual.get("h", config.sample_height) == config.sample_height
    assert usual.get("F", config.sample_frames) == config.sample_frames
    assert all(least[axis] == 1 for axis in axes & set("BRFTU"))
    assert all(size % config.patch == 0 for axis, size in least.items() if axis in "hw")
    assert least.get("h", 1) != least.get("w", 2)


@each_component
def test_a_row_number_points_at_a_row_that_is_there(
    config: GenTronConfig, component: Component
) -> None:
    counts = {"row_sample": "B", "row_modulation": "T", "row_text": "U", "slots": "R"}
    for case in [case for seed in range(5) for case in cases_of(component, config, seed)]:
        inputs = probe_inputs(component, case)
        for name, axis in counts.items():
            if name in inputs:
                assert inputs[name].dtype == np.int64
                assert inputs[name].min() >= 0
                assert inputs[name].max() < case.sizes[axis]


@each_component
def test_values_are_finite_and_of_the_size_that_a_request_has(
    config: GenTronConfig, component: Component
) -> None:
    for spec, values in every_input(component, config):
        if spec.name == "timesteps":
            assert values.min() > 0
            assert values.max() < 1000
        elif spec.name.startswith("mask_"):
            assert set(np.unique(values)) == {0, 1}
            assert (values[:, 0] == 1).all()
        elif spec.name.startswith("text_bias_"):
            assert set(np.unique(values)) == {0, MASKED}
            assert (values[..., 0] == 0).all()
        elif values.dtype == np.float32:
            assert np.isfinite(values).all()
            assert np.abs(values).max() < 8.6  # the largest of Box-Muller's normals


@each_component
def test_what_a_graph_reads_in_its_own_type_is_exact_in_half_precision(
    config: GenTronConfig, component: Component
) -> None:
    """So torch in float32 and an engine in float16 see the same numbers."""
    for spec, values in every_input(component, config):
        if spec.dtype == COMPUTE or spec.name.startswith("hidden_"):
            assert values.dtype == np.float32
            assert (values.astype(np.float16).astype(np.float32) == values).all(), spec.name


def test_real_prompts_come_with_the_case() -> None:
    component = contract(preset("tiny").transformer, 2)["text_encoder"]
    ids, mask = ((5, 6, 258) + (258,) * 13,), ((1, 1, 1) + (0,) * 13,)
    inputs = probe_inputs(component, ProbeCase(0, {"U": 1}, ids, mask))
    assert inputs["input_ids"].tolist() == [list(ids[0])]
    assert inputs["attention_mask"].tolist() == [list(mask[0])]
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == np.int64


# --- files ---


@each_component
def test_cases_and_outputs_come_back_from_a_file_as_they_were(
    config: GenTronConfig, component: Component, tmp_path: Path
) -> None:
    cases = cases_of(component, config, seed=2**64 - 1)
    rng = np.random.default_rng(1)
    outputs: list[dict[str, Array]] = [
        {spec.name: rng.standard_normal((2, 3)).astype(np.float32) for spec in component.outputs}
        for _ in cases
    ]
    file = tmp_path / "new" / f"{component.name}.safetensors"
    save_probes(file, cases, outputs)
    loaded = load_probes(file)
    assert [case for case, _ in loaded] == cases
    for (_, ours), expected in zip(loaded, outputs, strict=True):
        assert set(ours) == set(expected)
        assert all((ours[name] == expected[name]).all() for name in ours)


def test_two_files_of_the_same_probes_have_the_same_bytes(tmp_path: Path) -> None:
    config = preset("tiny").transformer
    component = contract(config, 2)["conditioner"]
    outputs: list[dict[str, Array]] = [{"modulation": np.ones(3, np.float32)}] * 2
    for name in ("a", "b"):
        save_probes(tmp_path / name, cases_of(component, config), outputs)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_more_than_ten_cases_keep_their_own_outputs(tmp_path: Path) -> None:
    """Case 1 is not a prefix of case 10."""
    cases = [ProbeCase(seed, {"T": 1}) for seed in range(12)]
    outputs: list[dict[str, Array]] = [{"x": np.full(1, i, np.float32)} for i in range(12)]
    save_probes(tmp_path / "p.safetensors", cases, outputs)
    loaded = load_probes(tmp_path / "p.safetensors")
    assert [(case.seed, float(values["x"][0])) for case, values in loaded] == [
        (i, float(i)) for i in range(12)
    ]
    assert all(set(values) == {"x"} for _, values in loaded)


def test_a_safetensors_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"x": np.zeros(2, np.float32)}, file)
    with pytest.raises(BundleError, match=r"weights\.safetensors: not a probe file"):
        load_probes(file)


def test_a_damaged_probe_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    save_probes(file, [ProbeCase(0, {"T": 1})], [{"x": np.zeros(64, np.float32)}])
    for damaged in (file.read_bytes()[:-8], b"", b"not a probe at all"):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"probe\.safetensors"):
            load_probes(file)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_sizes_to_probe(name: str) -> None:
    config = preset(name).transformer
    for component in contract(config, 8).values():
        for sizes in probe_sizes(component, config):
            assert min(sizes.values()) >= 1
