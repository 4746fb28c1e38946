"""`gentron-plan`: a table, or one clear line."""

from __future__ import annotations

import json

import pytest

from gentron.cli import plan as plan_command


@pytest.fixture
def gentron_plan(in_process):
    return in_process("gentron-plan", plan_command.cli)


def test_a_plan_is_marked_as_computed_and_ends_in_a_command(gentron_plan, tiny_bundle):
    done = gentron_plan(tiny_bundle, "--gpu", "L40S", "--latency", "800ms")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "computed from public figures, not measured" in first
    assert last.startswith(f"gentron-build {tiny_bundle} --backend tensorrt-rtx --gpu sm89 ")


def test_a_gpu_that_rtx_does_not_run_on_gets_tensorrt(gentron_plan, tiny_bundle):
    done = gentron_plan(tiny_bundle, "--gpu", "h100", "--latency", "1s")
    assert "--backend tensorrt --profile" in done.stdout.splitlines()[-1]


def test_json_holds_every_number(gentron_plan, tiny_bundle):
    done = gentron_plan(tiny_bundle, "--gpu", "L4", "--latency", "1s", "--json")
    values = json.loads(done.stdout)
    assert values["gpu"]["bandwidth"] == 300
    assert values["plans"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "abacus", "--latency", "1s"), "unknown GPU 'abacus'"),
        (("--gpu", "L4", "--latency", "fast"), "not a time, such as 800ms"),
        (("--gpu", "L4", "--latency", "0s"), "not a time"),
        (("--gpu", "L4", "--latency", "1s", "--memory", "much"), "not an amount of memory"),
        (("--gpu", "L4", "--latency", "1s", "--memory", "1KB"), "GB are there"),
        (("--gpu", "L4", "--latency", "1s", "--size", "17x16"), "try 16x16"),
        (("--gpu", "L4", "--latency", "1s", "--compute", 2), "at most 1"),
        (("--gpu", "L4"), "--latency"),
        (("--latency", "1s"), "name one with --gpu, or give a result with --measured FILE"),
        (("--latency", "1s", "--measured", "nowhere.json"), "cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused(gentron_plan, tiny_bundle, arguments, message):
    done = gentron_plan(tiny_bundle, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
