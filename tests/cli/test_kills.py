"""`scripts/kills.py` in its short form: a real server, killed five times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_accepted_job_ends_once_with_the_right_bytes(tiny_video_bundle, tmp_path):
    done = subprocess.run(
        [
            sys.executable, ROOT / "scripts" / "kills.py", tiny_video_bundle, "--kills", "5",
            "--frames", "3", "--steps", "60", "--folder", tmp_path / "jobs",
        ],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{log(tmp_path)}"
    found = re.search(r"(\d+) jobs accepted, (\d+) completed once with the right", done.stdout)
    assert found, done.stdout
    assert int(found[1]) == int(found[2]) >= 2


def log(folder: Path) -> str:
    file = folder / "log"
    return file.read_text()[-2000:] if file.exists() else "no log"
