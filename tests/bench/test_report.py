"""Times become rows, rows whole pictures, JSON and Markdown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gentron.bench.report import Report
from gentron.bench.rounds import Row, _row
from gentron.bench.work import EngineCall, Request, Work
from gentron.probe import ProbeCase

WORK = Work("nowhere", "step", (EngineCall("denoiser", ProbeCase(1, {"B": 2, "R": 4})),))
MACHINE = {"cpu": "abacus", "cores": 2, "instructions": ["avx2"], "memory_bytes": 8e9,
           "system": "wood"}  # fmt: skip


def contender(name, *rounds, **facts):
    facts = {"precision": "fp32", "label": name, "device": "cpu", **facts}
    return SimpleNamespace(
        name=name, rounds=[list(r) for r in rounds], facts=facts, peak_bytes=10, prepare_s=1.0
    )


def test_ratios_are_taken_round_by_round_so_that_a_slow_round_counts_for_both():
    ours = contender("ours", [1.0, 1.0], [10.0])
    peer = contender("peer", [2.0], [20.0, 20.0])
    row = _row(peer, WORK, ours, None)
    assert (row.times_first, row.times_first_range) == (2.0, (2.0, 2.0))
    assert row.samples_per_s == 2 / row.median_s


def test_the_share_of_the_peak_is_that_of_the_same_rounds():
    ours = contender("ours", [2.0], [4.0])
    machine = contender("machine", [1.0], [2.0], flops=100.0, graph_flops=150.0)
    row = _row(ours, WORK, ours, machine)
    assert row.peak_share == pytest.approx((150 / 2) / (100 / 1))
    elsewhere = contender("ours", [2.0], [4.0], device="NVIDIA L40S (sm89)")
    assert _row(elsewhere, WORK, elsewhere, machine).peak_share is None


@pytest.fixture
def report():
    times = {"encode": 0.1, "condition": 0.2, "step": 0.05, "decode": 0.3}
    rows = [
        Row("ours", "fp32", stage, seconds, label="it", samples_per_s=1 / seconds)
        for stage, seconds in times.items()
    ]
    rows.append(Row("ours", "bf16", "step", 0.025, spread=0.1, samples_per_s=40.0, label="it"))
    rows.append(Row("torch", "fp32", "step", None, problem="torch: too old"))
    request = Request((64, 64), batch=2, steps=10)
    return Report("tiny", "d" * 64, "random", request, MACHINE, rows, [{"problem": "none"}], 3)


def test_a_picture_is_all_stages_every_step_and_every_decode(report):
    fp32, bf16 = report.images()
    assert fp32["seconds"] == pytest.approx(0.1 + 0.2 + 10 * 0.05 + 2 * 0.3)
    assert fp32["images_per_s"] == pytest.approx(2 / fp32["seconds"])
    # What bfloat16 does not change is taken from the rows that there are.
    assert bf16["seconds"] == pytest.approx(fp32["seconds"] - 0.25)


def test_json_has_the_rows_with_their_names(report):
    values = json.loads(json.dumps(report.to_dict()))
    assert {"backend", "precision", "stage", "median_s"} <= values["rows"][0].keys()
    assert values["machine"]["cpu"] == "abacus"


def test_markdown_names_the_machine_and_why_there_is_no_figure(report):
    text = report.markdown()
    assert "abacus, 2 cores" in text
    assert "| step | torch | fp32 | none, see below |" in text
    assert "torch, step in fp32: torch: too old" in text
    assert "no peak: none" in text
