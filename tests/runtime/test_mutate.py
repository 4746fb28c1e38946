"""scripts/mutate.py, its short form: what is damaged draws nothing worse than an error of ours."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "mutate.py"


def test_damaged_bundles_and_requests_end_in_an_error_of_ours(tiny_bundle):
    command = [sys.executable, SCRIPT, "--bundle", tiny_bundle, "--bundles", "20", "--requests"]
    done = subprocess.run(
        [*map(str, command), "100", "--seed", "7"], capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "20 bundles: {" in done.stdout
    assert "100 requests: {200: " in done.stdout


def test_what_must_not_happen_is_noticed(tmp_path, monkeypatch):
    """A crash, a hang, a traceback and an error of two lines, each made on purpose."""
    spec = importlib.util.spec_from_file_location("mutate_script", SCRIPT)
    mutate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    for draw, outcome in (
        (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda folder: time.sleep(60), "hang"),
        (lambda folder: 1 / 0, "defect"),
        (lambda folder: "BundleError", "BundleError"),
    ):
        monkeypatch.setattr(mutate, "draw", draw)
        assert mutate.in_a_child(tmp_path, 1.0)[0] == outcome
    data = bytes(range(256)) * 4
    assert all(mutate.damaged_bytes(data, random.Random(n)) != data for n in range(50))
