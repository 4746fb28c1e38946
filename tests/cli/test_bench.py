"""`gentron-bench`: real contenders on a small model; JSON, Markdown, or one clear line."""

from __future__ import annotations

import json

import pytest

from gentron.cli import bench as bench_command

QUICK = ("--rounds", 2, "--seconds", 0)


@pytest.fixture
def gentron_bench(in_process):
    return in_process("gentron-bench", bench_command.cli)


def test_a_bundle_beside_torch_in_every_stage(gentron_bench, tiny_bundle, desk):
    done = gentron_bench(tiny_bundle, "--backend", "onnxruntime", "--against", "torch", "--json",
                         "-o", "found", *QUICK)  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert [(r["stage"], r["backend"]) for r in values["rows"]] == [
        (stage, name)
        for stage in ("encode", "condition", "step", "decode")
        for name in ("onnxruntime", "torch")
    ]
    for row in values["rows"]:
        assert row["median_s"] > 0, row["problem"]
        assert row["flops"] > 0
        assert row["peak_bytes"] > 1e7
    # Both computed the same from the same inputs.
    assert all(r["difference"] < 1e-4 for r in values["rows"] if r["backend"] == "torch")
    assert {i["backend"] for i in values["images"]} == {"onnxruntime", "torch"}
    assert json.loads((desk / "found.json").read_text()) == values
    assert "| step | torch | fp32 |" in (desk / "found.md").read_text()


def test_diffusers_stands_beside_the_step_and_says_what_it_is(gentron_bench):
    done = gentron_bench("emoji", "--backend", "openvino", "--precision", "bf16,fp32", "--stage",
                         "step", "--against", "diffusers", "--frames", 1, *QUICK)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PixArtTransformer2DModel, 10 blocks of 256, eager" in done.stdout
    assert "| step | diffusers | fp32 |" in done.stdout


def test_a_contender_that_cannot_run_has_a_line_that_says_why(gentron_bench, tiny_bundle):
    done = gentron_bench(tiny_bundle, "--backend", "onnxruntime", "--stage", "step", "--against",
                         "diffusers", *QUICK)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PixArt's MLP is 4 times its width, this model's 128 / 64" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "bundle 'nowhere' was not found"),
        (("emoji", "--against", "jax"), "unknown peer 'jax'"),
        (("emoji", "--backend", "abacus"), "unknown backend 'abacus'"),
        (("emoji", "--stage", "dream"), "unknown stage 'dream'"),
        (("emoji", "--precision", "fp4"), "unknown precision 'fp4'"),
        (("emoji", "--size", "65x64"), "try 64x64"),
        (("emoji", "--frames", 17), "frames: must be 1 to 16"),
        (("emoji", "--depth", 2), "depth: is for presets"),
        (("emoji", "--stage", "step", "--precision", "bf16"), "does not compute in bf16"),
    ],
)
def test_what_cannot_be_measured_is_refused(gentron_bench, arguments, message):
    done = gentron_bench(*arguments, "--backend", "onnxruntime", *QUICK) if (
        "--backend" not in arguments
    ) else gentron_bench(*arguments, *QUICK)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
