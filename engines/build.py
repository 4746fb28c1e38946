"""All of a bundle's engines, ahead of time: what `gentron-build` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gentron.bundle import Bundle
from gentron.engines.compiler import Compiler, Job
from gentron.engines.graphs import bundle_graph, decoder_default
from gentron.engines.options import EngineOptions
from gentron.engines.shapes import Declaration
from gentron.engines.store import Entry
from gentron.errors import RequestError


@dataclass(frozen=True)
class Built:
    job: Job
    entry: Entry

    @property
    def component(self) -> str:
        return self.job.graph.component.name


def plan_builds(
    bundle: Bundle,
    compiler: Compiler,
    *,
    components: Sequence[str] = (),
    precision: str | None = None,
    declarations: Sequence[Declaration] = (),
    targets: Sequence[str] = (),
) -> list[Job]:
    """Every engine that is to be, checked before the first is started.

    `precision` is the compiler's own choice by default. Raises RequestError for an unknown
    component, precision or target, ResourceError for one that this machine cannot build.
    """
    if unknown := [name for name in components if name not in bundle.components]:
        raise RequestError(
            "component", f"must be one of {', '.join(bundle.components)}, got {unknown[0]!r}"
        )
    if not components:
        bundle.check_complete()
    jobs: list[Job] = []
    for name in bundle.components:
        if not components or name in components:
            chosen = precision or compiler.precisions[0]
            if name == "vae_decoder" and (precision is None or name not in components):
                # As a pipeline chooses, so that it finds what was built.
                chosen = decoder_default(bundle, compiler)
            graph = bundle_graph(bundle, name, compiler.graph_precision(chosen), declarations)
            jobs += compiler.jobs(graph, chosen, targets)
    for job in jobs:
        compiler.check(job)
    return jobs


def build_engines(
    jobs: Sequence[Job], compiler: Compiler, options: EngineOptions
) -> Iterator[Built]:
    """Finds or builds them one after the other; one that is found costs nothing."""
    for job in jobs:
        report = options.reporting(job.graph.component.name)
        entry = options.store.obtain(job, compiler, report, compiler.prover(job))
        report("built" if entry.fresh else "was built before", 1.0)
        yield Built(job, entry)
