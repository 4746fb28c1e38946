"""A contender of our own: the bundle's graphs on one of the backends, as a request runs them."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gentron.bench.runner import Array, Runner
from gentron.bench.work import Work, profile_of
from gentron.bundle import Bundle
from gentron.contract import PRECISIONS
from gentron.engines import Backend, Engine, EngineOptions, backend_named, bundle_graph
from gentron.engines.base import Buffer, Call
from gentron.engines.graphs import declarations
from gentron.probe import in_compute_type, probe_inputs

# Written into the folder of a bundle that exists only to be measured: no engine of it is kept.
TEMPORARY = "only-for-benchmarks"
ON_CPU = ("openvino", "onnxruntime")
SHORT_NAMES = {compute: precision for precision, compute in PRECISIONS.items()}


@dataclass(frozen=True)
class Bound:
    """One call with its memory."""

    call: Call
    outputs: dict[str, Buffer]
    probe: Buffer  # the smallest output: reading it waits for the call


class EngineRunner(Runner):
    """Buffers and bindings are made once, as the loop makes them; a run is calls alone."""

    def __init__(self, work: Work, backend: str):
        """Raises BackendError for a backend or precision that is not to be had here, BundleError
        for a component that the bundle does not hold."""
        self._closing = ExitStack()
        bundle = Bundle.open(work.bundle)
        made = self._closing.enter_context(
            backend_named(backend, EngineOptions(threads=work.threads))
        )
        engines = {c.component: self._load(bundle, made, work, c.component) for c in work.calls}
        self._bound = [
            _bind(engines[call.component], _feeds(engines[call.component], call.case))
            for call in work.calls
        ]
        # Components may compute in more than what was asked for, never in less.
        computed = {engine.info.precision for engine in engines.values()}
        info = next(iter(engines.values())).info
        self.facts = {
            "label": made.describe(),
            "device": info.device,
            "precision": SHORT_NAMES[max(computed, key=_width)],
            "versions": {backend: info.version},
        }

    def _load(self, bundle: Bundle, backend: Backend, work: Work, name: str) -> Engine:
        graph = bundle_graph(
            bundle,
            name,
            backend.graph_precision(work.precision),
            declarations(bundle, [profile_of(work, bundle)]),
        )
        if backend.name in ON_CPU and (bundle.path / TEMPORARY).exists():
            graph = replace(graph, digest="")
        return self._closing.enter_context(closing(backend.load(graph, work.precision)))

    def run(self) -> None:
        for bound in self._bound:
            bound.call.run()
            bound.probe.read()

    def outputs(self) -> dict[str, Array]:
        return {
            f"{number}.{name}": buffer.read()
            for number, bound in enumerate(self._bound)
            for name, buffer in bound.outputs.items()
        }

    def close(self) -> None:
        self._closing.close()


def _width(compute: str) -> int:
    return 2 if compute == "bfloat16" else np.dtype(compute).itemsize


def _feeds(engine: Engine, case: Any) -> dict[str, Array]:
    return in_compute_type(engine.component, probe_inputs(engine.component, case), engine.compute)


def _bind(engine: Engine, feeds: dict[str, Array]) -> Bound:
    component = engine.component
    sizes = component.bind({name: values.shape for name, values in feeds.items()})
    sizes |= engine.output_sizes(sizes)
    buffers = {name: engine.buffer(name, values.shape) for name, values in feeds.items()}
    outputs = {
        spec.name: engine.buffer(
            spec.name, tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
        )
        for spec in component.outputs
    }
    for name, values in feeds.items():
        buffers[name].write(values)
    call = engine.bind({**buffers, **outputs})
    return Bound(call, outputs, min(outputs.values(), key=lambda b: int(np.prod(b.shape))))


def mark_temporary(folder: Path) -> None:
    """Says of a bundle that its engines are not worth keeping."""
    (folder / TEMPORARY).touch()
