"""A whole benchmark: every stage in every precision, its contenders in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from gentron.bench.machine import machine_facts, physical_cores
from gentron.bench.peers import check_peers
from gentron.bench.report import Report
from gentron.bench.rounds import measure
from gentron.bench.temporary import find_bundle, is_preset
from gentron.bench.work import STAGES, request_of, stage_work
from gentron.contract import PRECISIONS
from gentron.engines import backend_named
from gentron.engines.registry import BACKENDS
from gentron.errors import BackendError, RequestError

ROUNDS, SECONDS = 7, 0.5


def run_benchmark(
    name: str,
    *,
    backends: Sequence[str] = (),
    against: Sequence[str] = (),
    stages: Sequence[str] = (),
    precisions: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    batch: int = 1,
    frames: int | None = None,
    guidance: float | None = None,
    motion: float | None = None,
    depth: int = 0,
    threads: int = 0,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measures a bundle (packaged name or folder) or preset.

    `backends` are ours, the first usable by default; `against` are peers of `gentron/bench/peers`.
    Every contender of a stage runs for `seconds` in each of `rounds` rounds. By default a bundle
    is measured in all of its stages and a preset in its step, in the first backend's own precision.
    Raises RequestError, BundleError or BackendError; a contender that fails later has a row that
    says why, unless none at all can run.
    """
    check_peers(tuple(against))
    _check_names("backend", backends, tuple(BACKENDS))
    _check_names("stage", stages, STAGES)
    _check_names("precision", precisions, tuple(PRECISIONS))
    if rounds < 1 or batch < 1:
        raise RequestError("rounds" if rounds < 1 else "batch", "must be at least 1")
    with backend_named(backends[0] if backends else None) as first:
        backends = backends or [first.name]
        precisions = precisions or first.precisions[:1]
    stages = stages or (("step",) if is_preset(name) else STAGES)
    bundle = find_bundle(name, stages, say, depth)
    request = request_of(
        bundle, size=size, batch=batch, frames=frames, guidance=guidance, motion=motion
    )
    report = Report.of(bundle, request, machine_facts(), rounds)
    workers = threads or physical_cores()
    seen: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for stage in (stage for stage in STAGES if stage in stages):
            work = stage_work(bundle, stage, request, threads)
            for precision in precisions:
                rows, peak = measure(
                    bundle, work.in_precision(precision), (*backends, *_fitting(against, stage)),
                    threads=workers, rounds=rounds, seconds=seconds, logs=Path(folder), say=say,
                )  # fmt: skip
                computed = rows[0].precision
                if (stage, computed) in seen:
                    continue  # asked for in fewer bits than it is computed in
                seen.add((stage, computed))
                report.rows += rows
                report.peaks += [peak] if peak not in report.peaks else []
    if all(row.median_s is None for row in report.rows):
        raise BackendError(report.rows[0].problem)
    return report


def _fitting(against: Sequence[str], stage: str) -> list[str]:
    """diffusers has an equal of the step alone."""
    return [name for name in against if stage == "step" or not name.startswith("diffusers")]


def _check_names(field: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise RequestError(field, f"unknown {field} {name!r}; one of {', '.join(known)}")
