"""What a generation gives back: pictures, and everything that is needed to explain or repeat it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.engines.base import EngineInfo
from gentron.guidance import Interval


@dataclass(frozen=True)
class StageReport:
    """Time and memory of one stage (text, condition, denoise, decode)."""

    stage: str
    seconds: float
    resident_mib: float | None  # of the process when the stage ended; None where unknown
    calls: int  # of engines


@dataclass(frozen=True)
class Settings:
    """A request with every default filled in: enough, with the bundle, to repeat it."""

    prompt: str
    negative: str
    seed: int  # of the batch's first sample; sample k has seed + k
    steps: int
    solver: str
    eta: float
    guidance: float
    motion: float
    width: int
    height: int
    frames: int
    batch: int
    guidance_interval: Interval | None = None  # noise levels; None: guidance in every step


@dataclass(frozen=True)
class Result:
    videos: npt.NDArray[np.uint8]  # [B, F, H, W, 3]; an image is a video of one frame
    latents: npt.NDArray[np.float32]  # [B, F, C, h, w]
    settings: Settings
    seeds: tuple[int, ...]  # one for each sample
    stages: tuple[StageReport, ...]
    components: tuple[EngineInfo, ...]  # backend, device and precision of each
    bundle: str
    digest: str
    weights: str  # "trained" or "random"
    warnings: tuple[str, ...]

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """The first frames, [B, H, W, 3]: of an image, all there is."""
        return self.videos[:, 0]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def metadata(self, row: int) -> dict[str, Any]:
        """All that is needed to make sample `row` again, as JSON values."""
        from gentron import __version__

        return {
            "gentron": __version__,
            **vars(self.settings),
            "row": row,
            "row_seed": self.seeds[row],
            "bundle": self.bundle,
            "digest": self.digest,
            "weights": self.weights,
            "machine": machine(),
            "numpy": np.__version__,
            "engines": {
                info.component: {
                    "backend": info.backend,
                    "device": info.device,
                    "precision": info.precision,
                    "version": info.version,
                }
                for info in self.components
            },
        }


@dataclass
class StageClock:
    """Collects a report for each stage of one generation."""

    reports: list[StageReport] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """Yields a dict whose "calls" the stage sets."""
        counts = {"calls": 0}
        started = perf_counter()
        yield counts
        self.add(name, perf_counter() - started, counts["calls"])

    def add(self, name: str, seconds: float, calls: int) -> None:
        self.reports.append(StageReport(name, seconds, resident_mib(), calls))


def resident_mib() -> float | None:
    """Resident memory of this process; None where the system has no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            pages = int(stream.read().split()[1])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize() / 2**20


def machine() -> str:
    """The processor by name: on another one, the last bits of a picture may differ."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if "model name" in line]
    except OSError:
        names = []
    return f"{platform.machine()} {names[0] if names else platform.processor()}".strip()
