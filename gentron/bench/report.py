"""Figures as JSON and as Markdown, with the machine and the versions that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gentron
from gentron.bench.rounds import Row
from gentron.bench.work import STAGES, Request
from gentron.bundle import Bundle

HEADER = (
    "stage", "backend", "precision", "median", "spread", "a second", "of peak", "memory",
    "times the first", "differs",
)  # fmt: skip


@dataclass
class Report:
    bundle: str
    digest: str
    weights: str
    request: Request
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    peaks: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0

    @classmethod
    def of(cls, bundle: Bundle, request: Request, machine: dict[str, Any], rounds: int) -> Report:
        manifest = bundle.manifest
        return cls(manifest.name, bundle.digest, manifest.weights, request, machine, rounds=rounds)

    def images(self) -> list[dict[str, Any]]:
        """Whole pictures by backend and the step's precision, where all of its stages were
        measured: their times added up, every frame decoded."""
        found = []
        for step in (row for row in self.rows if row.stage == "step" and row.median_s):
            others = [self._beside(step, stage) for stage in STAGES if stage != "step"]
            if any(row is None or row.median_s is None for row in others):
                continue
            encode, condition, decode = (row.median_s for row in others if row)
            assert encode and condition and decode and step.median_s  # noqa: PT018
            pictures = self.request.batch * self.request.frames
            whole = encode + condition + self.request.steps * step.median_s + pictures * decode
            found.append({
                "backend": step.backend, "precision": step.precision, "steps": self.request.steps,
                "seconds": whole, "images_per_s": pictures / whole,
            })  # fmt: skip
        return found

    def _beside(self, step: Row, stage: str) -> Row | None:
        """The same backend's row of another stage, in the same precision if it computes in it."""
        rows = [r for r in self.rows if r.backend == step.backend and r.stage == stage]
        same = [r for r in rows if r.precision == step.precision]
        return next(iter(same or rows), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "gentron": gentron.__version__,
            "bundle": self.bundle,
            "digest": self.digest,
            "weights": self.weights,
            "request": asdict(self.request),
            "rounds": self.rounds,
            "machine": self.machine,
            "rows": [row.to_dict() for row in self.rows],
            "images": self.images(),
            "gemm_peaks": self.peaks,
        }

    def markdown(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        machine, request = self.machine, self.request
        width, height = request.size
        weights = "random weights" if self.weights == "random" else f"digest {self.digest[:16]}"
        asked = f"batch {request.batch}, frames {request.frames}, guidance {request.guidance:g}"
        chip = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}"
        memory = f"{machine['memory_bytes'] / 1e9:.0f} GB"
        yield f"# {self.bundle}, {width}x{height}"
        yield ""
        yield f"{weights}; {asked}, {request.steps} steps; gentron {gentron.__version__}"
        yield f"{chip}, {memory}; {machine['system']}"
        yield f"median of {self.rounds} rounds in which all contenders of a stage took turns"
        yield ""
        yield _row(HEADER)
        yield "|" + "---|" * len(HEADER)
        yield from (_row(_cells(row)) for row in self.rows)
        yield ""
        for found in self.images():
            rate, whole = f"{found['images_per_s']:.3g}", _seconds(found["seconds"])
            name = f"{found['backend']} {found['precision']}"
            yield f"- {name}: {rate} images a second, {whole} for {found['steps']} steps and all"
        yield from map(_peak, self.peaks)
        for row in self.rows:
            if row.problem:
                yield f"- {row.backend}, {row.stage} in {row.precision}: {row.problem}"
        for label in dict.fromkeys(f"{r.backend}: {r.label}" for r in self.rows if r.label):
            yield f"- {label}"


def _peak(found: dict[str, Any]) -> str:
    if "flops_per_s" not in found:
        return f"- no peak: {found['problem']}"
    rate = f"{found['flops_per_s'] / 1e9:.0f} GFLOP/s"
    counted = found["graph_flops_counted"]
    return f"- peak in {found['precision']}: {rate} ({found['with']}); operations counted {counted}"


def _cells(row: Row) -> Sequence[str]:
    start = (row.stage, row.backend, row.precision)
    if row.median_s is None:
        return (*start, "none, see below", *[""] * (len(HEADER) - 4))
    times = "1"
    if row.times_first is not None and row.times_first_range is not None:
        low, high = row.times_first_range
        times = f"{row.times_first:.2f} ({low:.2f} to {high:.2f})"
    return (
        *start,
        _seconds(row.median_s),
        f"{row.spread or 0:.1%}",
        f"{row.samples_per_s:.3g}",
        "" if row.peak_share is None else f"{row.peak_share:.0%}",
        f"{row.peak_bytes / 1e9:.2f} GB",
        times,
        "" if row.difference is None else f"{row.difference:.0e}",
    )


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
