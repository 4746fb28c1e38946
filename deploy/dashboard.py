"""Writes the Grafana dashboard beside it: `python deploy/dashboard.py > deploy/grafana.json`."""

from __future__ import annotations

import json
import sys
from typing import Any


def quantiles(name: str, by: str = "") -> list[tuple[str, str]]:
    group = f"le, {by}" if by else "le"
    label = f"{{{{{by}}}}} " if by else ""
    return [
        (f"histogram_quantile({q}, sum by ({group}) (rate({name}_bucket[$__rate_interval])))",
         f"{label}p{round(q * 100)}")
        for q in (0.5, 0.95)
    ]  # fmt: skip


def mean(name: str) -> list[tuple[str, str]]:
    rate = "[$__rate_interval]"
    return [(f"sum(rate({name}_sum{rate})) / sum(rate({name}_count{rate}))", "mean")]


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Requests that ended, a second", "reqps",
     [("sum by (outcome) (rate(gentron_requests_total[$__rate_interval]))", "{{outcome}}")]),
    ("Waiting and under way", "short",
     [("sum(gentron_requests_waiting)", "waiting"),
      ("sum(gentron_requests_running)", "under way")]),
    ("From arrival to the end", "s", quantiles("gentron_request_seconds", "outcome")),
    ("From arrival to start", "s", quantiles("gentron_queue_seconds")),
    ("From arrival to the first step", "s", quantiles("gentron_first_step_seconds")),
    ("One call of the denoiser", "s", quantiles("gentron_step_seconds")),
    ("Branch rows and samples of a call", "short",
     [*mean("gentron_step_rows"), (mean("gentron_step_samples")[0][0], "samples")]),
    ("Stages", "s", quantiles("gentron_stage_seconds", "stage")),
    ("Memory of the process", "bytes", [("gentron_resident_bytes", "{{instance}}")]),
    ("Refused before any route, a second", "reqps",
     [("sum by (reason) (rate(gentron_http_refused_total[$__rate_interval]))", "{{reason}}")]),
    ("Calls that failed and were tried again", "short",
     [("sum(increase(gentron_retries_total[$__rate_interval]))", "retries")]),
    ("Bundle, reloads, draining", "short",
     [("sum by (name, digest) (gentron_bundle_info)", "{{name}} {{digest}}"),
      ("sum by (outcome) (increase(gentron_reloads_total[1h]))", "reloads {{outcome}}"),
      ("sum(gentron_draining)", "draining")]),
]  # fmt: skip


def panel(number: int, title: str, unit: str, targets: list[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + k), "expr": expression, "legendFormat": legend, "datasource": source}
            for k, (expression, legend) in enumerate(targets)
        ],
    }


def dashboard() -> dict[str, Any]:
    return {
        "title": "GenTron",
        "uid": "gentron",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "type": "datasource", "query": "prometheus",
                      "label": "Prometheus"}]
        },
        "panels": [panel(number, *values) for number, values in enumerate(PANELS)],
    }  # fmt: skip


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
