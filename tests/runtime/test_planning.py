"""Plans for GPUs that are not here: arithmetic on counted operations and public figures."""

from __future__ import annotations

import json

import pytest

from gentron.bundle import Bundle
from gentron.errors import RequestError
from gentron.runtime.cost import Cost, denoiser_cost
from gentron.runtime.gpus import GPUS, gpu_named
from gentron.runtime.measured import read_measured
from gentron.runtime.planning import (
    Efficiency,
    make_plan,
    measured_machine,
    plans_within,
    roofline_seconds,
)

L40S = GPUS["L40S"]
FULL = Efficiency(1.0, 1.0)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture
def ask(bundle):
    return {"size": bundle.native_size, "guidance": 4.0}


def test_the_roofline_is_the_slower_of_operations_and_bytes():
    many = Cost(flops=362e12, weight_bytes=1, table_bytes=0, activation_bytes=0)
    assert roofline_seconds(many, L40S, FULL) == (1.0, "compute")
    large = Cost(flops=1, weight_bytes=400e9, table_bytes=400e9, activation_bytes=64e9)
    assert roofline_seconds(large, L40S, FULL) == (1.0, "bandwidth")
    assert roofline_seconds(many, L40S, Efficiency(0.5, 1.0))[0] == 2.0


@pytest.mark.parametrize("name", ["L40S", "l40s", "rtx 4090", "RTX-4090", "NVIDIA H100"])
def test_gpus_are_found_however_they_are_written(name):
    assert gpu_named(name).name in ("L40S", "RTX4090", "H100")


def test_an_unknown_gpu_lists_the_known():
    with pytest.raises(RequestError, match="unknown GPU 'abacus'; one of T4, A10"):
        gpu_named("abacus")


def test_data_centre_gpus_that_rtx_does_not_run_on_are_marked():
    assert [gpu.name for gpu in GPUS.values() if not gpu.rtx] == ["H100", "H200", "B200"]


def test_guidance_makes_rows_and_a_plan_names_them_for_the_builder(bundle, ask):
    two = make_plan(bundle, L40S, steps=8, batch=2, **ask)
    one = make_plan(bundle, L40S, steps=8, batch=2, **(ask | {"guidance": 1.0}))
    assert (two.rows, one.rows) == (4, 2)
    assert two.seconds > one.seconds
    width, height = bundle.native_size
    assert two.profile.startswith(f"samples=2,rows=4,size={width}x{height},frames=1,table=1:16:")


def test_the_profile_of_a_plan_is_one_that_can_be_built(bundle, ask):
    from gentron.engines.graphs import declarations
    from gentron.engines.shapes import contains

    plan = make_plan(bundle, L40S, steps=20, batch=4, **ask)
    (declared,) = declarations(bundle, [plan.profile])
    profile = declared.profile(bundle.components["denoiser"], bundle.vae_factor)
    h, w = (side // bundle.vae_factor for side in reversed(bundle.native_size))
    sizes = {"B": 4, "R": plan.rows, "F": 1, "T": 40, "U": 2, "h": h, "w": w}
    assert contains(profile, sizes)


def test_more_time_buys_steps_and_no_plan_is_over_it(bundle, ask):
    some = plans_within(bundle, L40S, 0.002, **ask)
    more = plans_within(bundle, L40S, 0.02, **ask)
    assert all(plan.seconds <= 0.002 for plan in some)
    assert more[0].steps > some[0].steps
    assert [plan.batch for plan in more] == sorted({plan.batch for plan in more})


def test_too_little_time_is_refused_with_what_it_would_take(bundle, ask):
    with pytest.raises(RequestError, match=r"latency: 4 steps alone take about .* ms on a L40S"):
        plans_within(bundle, L40S, 1e-9, **ask)


def test_engines_take_turns_where_they_do_not_fit_together(bundle, ask):
    whole = make_plan(bundle, L40S, steps=4, batch=1, **ask)
    assert whole.resident
    tight = make_plan(bundle, L40S, steps=4, batch=1, memory=whole.memory_bytes - 1, **ask)
    assert not tight.resident
    assert tight.memory_bytes < whole.memory_bytes
    with pytest.raises(RequestError, match=r"memory: .* need .* GB, 0.0 GB are there"):
        make_plan(bundle, L40S, steps=4, batch=1, memory=1000, **ask)


@pytest.mark.parametrize("share", [0, -1, 1.01])
def test_no_kernel_is_faster_than_the_gpu(share):
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        Efficiency(compute=share)


def test_a_g2_step_at_512_is_what_the_performance_page_says():
    """docs/performance.md quotes these."""
    from gentron.presets import PRESETS

    config = PRESETS["g2"].transformer
    sizes = {"B": 1, "R": 2, "F": 1, "h": 64, "w": 64}
    cost = denoiser_cost(config, sizes, 2)
    assert cost.flops / 1e12 == pytest.approx(8.36, abs=0.01)
    assert cost.weight_bytes / 1e9 == pytest.approx(3.72, abs=0.01)
    assert cost.table_bytes / 1e6 == pytest.approx(64.8, abs=0.5)


@pytest.fixture
def result(bundle, tmp_path):
    """A file of gentron-bench with one step of `seconds`."""

    def write(seconds=0.5, device="cpu", **changed):
        width, height = bundle.native_size
        sizes = {"B": 1, "R": 2, "F": 1, "h": height // bundle.vae_factor,
                 "w": width // bundle.vae_factor, "T": 8, "U": 2}  # fmt: skip
        row = {"backend": "openvino", "precision": "fp32", "device": device, "stage": "step",
               "median_s": seconds, "sizes": sizes}  # fmt: skip
        encode = row | {"stage": "encode", "median_s": 0.25, "sizes": {"U": 1}}
        values = {"bundle": "tiny", "machine": {"memory_bytes": 8e9}, "rows": [encode, row]}
        file = tmp_path / "result.json"
        file.write_text(json.dumps(values | changed))
        return file

    return write


def test_a_measured_step_takes_the_place_of_a_computed_one(bundle, ask, result):
    measured = read_measured((result(seconds=0.5),), bundle)
    machine = measured_machine(measured, bundle)
    plan = make_plan(bundle, machine, steps=4, batch=1, measured=measured, efficiency=FULL, **ask)
    assert (plan.how, plan.step_seconds) == ("measured", pytest.approx(0.5))
    assert measured.on_top() == "encode 250 ms"


def test_another_shape_is_scaled_by_its_operations(bundle, ask, result):
    measured = read_measured((result(seconds=0.5),), bundle)
    machine = measured_machine(measured, bundle)
    plan = make_plan(bundle, machine, steps=4, batch=4, measured=measured, efficiency=FULL, **ask)
    assert (plan.how, plan.step_seconds) == ("scaled", pytest.approx(2.0))


def test_a_measurement_on_the_gpu_corrects_what_was_assumed_of_it(bundle, ask, result):
    measured = read_measured((result(device="NVIDIA L40S (sm89)"),), bundle)
    measured.check_device("L40S")
    plan = make_plan(bundle, L40S, steps=4, batch=1, measured=measured, **ask)
    assert plan.step_seconds == pytest.approx(0.5)
    with pytest.raises(RequestError, match=r"measured on NVIDIA L40S .sm89., which is no H100"):
        measured.check_device("H100")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bundle": "emoji"}, "is of emoji, not of tiny; run: gentron-bench"),
        ({"rows": []}, "holds no step$"),
        ({"rows": [{"backend": "x"}]}, "not a result of gentron-bench"),
        ({"rows": 3}, "not a result of gentron-bench"),
    ],
)
def test_a_file_that_is_no_result_of_this_model_is_refused(bundle, result, changed, message):
    with pytest.raises(RequestError, match=message):
        read_measured((result(**changed),), bundle)
