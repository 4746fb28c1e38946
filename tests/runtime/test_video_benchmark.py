"""benchmarks/video.py in its shortest form: the columns are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_video_benchmark_runs_on_two_bundles(tiny_bundle, tiny_video_bundle, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "video.py"), str(tiny_video_bundle)]
    command += ["--images", str(tiny_bundle), "--frames", "1,3", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", "rows.json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    one, three = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert (one["frames"], three["frames"]) == (1, 3)
    assert one["text_bytes"] == three["text_bytes"] > 0
    assert min(min(row.values()) for row in (one, three)) > 0
    assert 0 < one["counted_share"] < three["counted_share"] < 1  # attention grows with frames
    assert "temporal layers took" in done.stdout
    assert "ms a frame" in done.stdout


def test_a_bundle_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "video.py"), "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
