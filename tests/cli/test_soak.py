"""The script of minutes of too much work, in its shortest form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


def test_with_more_work_than_it_can_do_a_server_loses_and_mixes_up_nothing(tiny_bundle):
    options = ("--minutes", "0.1", "--settle", "1", "--size", "16x16", "--backend", "onnxruntime")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny_bundle), *options],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    drawn, lost, mixed = (
        int(found[1])
        for name in ("drawn", "lost", "mixed up")
        if (found := re.search(rf"(\d+) {name}", done.stdout))
    )
    assert drawn > 5
    assert (lost, mixed) == (0, 0)
