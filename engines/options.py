"""How a backend is to behave: where compiled engines come from, for which devices, how loudly."""

from __future__ import annotations

from dataclasses import dataclass, field

from gentron.engines.cache import EngineCache
from gentron.engines.compiler import Report, silent
from gentron.engines.store import EngineStore


@dataclass(frozen=True)
class EngineOptions:
    """What every backend takes; each uses what applies to it."""

    store: EngineStore = field(default_factory=EngineCache)
    targets: tuple[str, ...] = ()  # GPU generations such as sm89; empty: the compiler's default
    threads: int = 0  # of a CPU backend; 0: all physical cores
    report: Report = silent  # progress of what has to be built
