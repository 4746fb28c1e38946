"""The serving benchmarks in their shortest form: the claims about the policy, and the columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: object, folder: Path) -> list[dict]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(
        [*command, "--json", "found.json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text("utf-8"))
    return found if isinstance(found, list) else found["rows"]


def test_by_step_first_steps_come_in_a_fraction_of_the_time_and_throughput_is_kept(tmp_path):
    rows = run("serving_policies.py", "--requests", 250, "--loads", "0.9", folder=tmp_path)
    for curve in ("512x512", "1024x1024"):
        by = {row["policy"]: row for row in rows if row["curve"] == curve}
        assert by["step"]["first_p95"] <= 0.3 * by["request"]["first_p95"]
        assert by["step"]["per_minute"] >= 0.97 * by["request"]["per_minute"]
    by = {row["policy"]: row for row in rows if row["curve"] == "512x512"}
    assert by["step"]["per_minute"] >= by["request"]["per_minute"] > 2 * by["one"]["per_minute"]
    assert by["step"]["total_p50"] < by["request"]["total_p50"]


def test_the_benchmark_of_a_real_bundle_draws_every_request_three_ways(tiny_bundle, tmp_path):
    options = ("--requests", 8, "--loads", "0.9", "--size", "16x16", "--batch", 2)
    rows = run("serving.py", tiny_bundle, "--backend", "onnxruntime", *options, folder=tmp_path)
    assert [row["way"] for row in rows] == ["one", "request", "step"]
    for row in rows:
        assert 0 < row["first"]["p50"] < row["total"]["p50"]
        assert row["first"]["p50"] < row["preview"]["p50"] <= row["total"]["p99"]
    assert rows[2]["samples_per_call"] >= 1
