"""The files that operators install: a dashboard of metrics that exist, a unit and a container file
whose options exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gentron.cli import serve
from gentron.runtime.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OPTIONS = {flag for parameter in serve.cli.params for flag in parameter.opts}


@pytest.fixture(scope="module")
def shown() -> set[str]:
    """Names on /metrics once everything has happened that is counted by label."""
    metrics = Metrics()
    metrics.refused("host")
    metrics.reloaded("completed")
    metrics.serves("emoji", "0" * 64)
    metrics.staged("text", 0.1)
    metrics.finished("completed", 1.0)
    lines = metrics.render().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_every_metric_of_the_dashboard_is_there_and_every_metric_is_on_it(shown):
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"gentron_\w+", text)}
    assert used <= shown
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in shown}
    covered = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert families - covered == {
        name for name in families - covered if name.replace("_total", "") + "_total" in covered
    }
    assert {"gentron_queue_seconds", "gentron_step_rows", "gentron_resident_bytes"} <= covered


def test_the_dashboard_is_what_its_program_writes():
    made = subprocess.run(
        [sys.executable, DEPLOY / "dashboard.py"], capture_output=True, text=True, check=True
    )
    assert made.stdout == (DEPLOY / "grafana.json").read_text()


def test_the_unit_is_one_and_its_options_are_options(tmp_path):
    text = (DEPLOY / "gentron.service").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert {word for word in shlex.split(command) if word.startswith("--")} <= OPTIONS
    for setting in ("DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict"):
        assert setting in text
    stop = int(re.findall(r"TimeoutStopSec=(\d+)", text)[0])
    assert stop > int(re.findall(r"--drain-timeout (\d+)", text)[0])
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "gentron.service"  # with a program that is there
        unit.write_text((DEPLOY / "gentron.service").read_text().replace(
            "/opt/gentron/bin/gentron-serve", "/bin/true"))  # fmt: skip
        done = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_the_container_file_starts_the_server_as_nobody_special():
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL",
             "HEALTHCHECK", "ENTRYPOINT"}  # fmt: skip
    assert {name for name, _ in steps} <= known
    last = dict(steps)
    assert last["USER"] == "10001"
    command = json.loads(last["ENTRYPOINT"])
    assert command[0] == "gentron-serve"
    assert {word for word in command if word.startswith("--")} <= OPTIONS
