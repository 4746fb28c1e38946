"""The scripts of `benchmarks/` in their short form: they run, compare and print a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ("--rounds", "1", "--seconds", "0")


@pytest.fixture
def script(tmp_path):
    def run(name: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / name), *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_loops_stand_side_by_side(script):
    empty, tail, diffusers = rows_of(script("host.py", "--rounds", "5", "--seconds", "0.1"))
    assert "PixArtAlphaPipeline" in diffusers[0]
    assert float(empty[3]) > 0
    assert float(tail[3]) > 0


def test_both_pipelines_draw_the_same_picture(script):
    """The script ends with an error if they do not."""
    ours, torch = rows_of(script("end_to_end.py", "--steps", "2", "--backend", "onnxruntime",
                                 *QUICK))  # fmt: skip
    assert "GenTron on onnxruntime" in ours[0]
    assert "torch" in torch[0]


def test_growth_is_measured_beside_what_is_counted(script, tiny_video_bundle):
    text = script("growth.py", "-m", tiny_video_bundle, "--depth", "0", "--short", "--side", "32",
                  "--precision", "fp32", "--backend", "onnxruntime", *QUICK)  # fmt: skip
    two, one = rows_of(text)
    assert (two[2], one[2]) == ("2", "1")


def test_the_time_of_a_step_is_told_by_kind_of_operation(script, tiny_bundle):
    text = script("layers.py", "-m", tiny_bundle, "--size", "32x32", "--precision", "fp32")
    kinds = {row[0] for row in rows_of(text)}
    assert "FullyConnected" in kinds
