"""How a backend is to behave: where compiled engines come from, for which devices, how loudly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gentron.engines.cache import EngineCache
from gentron.engines.compiler import Report
from gentron.engines.folder import EngineFolder, check_sha256
from gentron.engines.store import EngineStore
from gentron.errors import RequestError

ComponentReport = Callable[[str, str, float], None]  # (component, what is being done, share done)


def silent(component: str, doing: str, share: float) -> None:
    """A `ComponentReport` for callers that show nothing."""


@dataclass(frozen=True)
class EngineOptions:
    """What every backend takes; each uses what applies to it."""

    store: EngineStore = field(default_factory=EngineCache)
    targets: tuple[str, ...] = ()  # GPU generations such as sm89; empty: the compiler's default
    strip: bool = False  # TensorRT's plans without weights, which are read from the bundle
    device: int | None = None  # number of the GPU; None: the first, and a CPU will do
    threads: int = 0  # of a CPU backend; 0: all physical cores
    report: ComponentReport = silent  # progress of what has to be built

    def reporting(self, component: str) -> Report:
        return partial(self.report, component)


def engine_store(engines: Path | None, sha256: str | None, *, build: bool = True) -> EngineStore:
    """The user's cache, or a folder of engines built elsewhere with the digest of its manifest.

    Raises RequestError for one without the other, BackendError for a folder that does not match.
    """
    if engines is None:
        if sha256 is not None:
            raise RequestError("engines-sha256", "is a folder's digest: name it with --engines")
        return EngineCache(build=build)
    if sha256 is None:
        raise RequestError(
            "engines",
            "engines are code, so the sha256 that gentron-build printed is needed too: pass "
            "--engines-sha256 HEX",
        )
    return EngineFolder(engines, check_sha256(sha256))
