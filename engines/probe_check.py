"""A bundle's golden probes, replayed on an engine: finds what digests cannot, without torch.

Digests say that files are the ones the manifest names. Probes say that this graph with these
weights on this engine computes what torch computed: they find a bundle that was altered and sealed
again, a graph over the wrong weights, and an engine that computes in less than it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from gentron.agreement import Agreement, Array, compare
from gentron.bundle import Bundle
from gentron.contract import PRECISIONS, Component
from gentron.engines.base import Backend, Engine
from gentron.engines.graphs import bundle_graph
from gentron.errors import BundleError, RequestError
from gentron.probe import ProbeCase, in_compute_type, load_probes, probe_inputs

Probes = list[tuple[ProbeCase, dict[str, Array]]]

ABSENT = "the bundle was exported without it; export it again without --only to check it"
NO_ARRAYS = "numpy has no arrays of this type to feed it; the fp32 graph reads the same weights"
UNREAD = "{} does not read this graph; check it with a --backend that does"


@dataclass(frozen=True)
class GraphCheck:
    """What the probes of one component found in one of its precisions."""

    component: str
    precision: str  # asked for, and so of the tolerance: fp32, bf16, fp16; empty if there is none
    computed: str = ""  # what the engine says that it computes in; empty if it never loaded
    runner: str = ""  # backend, version and device
    agreements: tuple[Agreement, ...] = ()
    problem: str = ""  # why the engine could not be loaded, or not be run to the end
    skipped: str = ""  # why nothing was tried

    @property
    def result(self) -> str:
        """`pass`, `fail` or `skipped`. Comparing nothing is never a pass."""
        if self.skipped:
            return "skipped"
        agree = bool(self.agreements) and all(a.passed for a in self.agreements)
        return "pass" if agree and not self.problem else "fail"

    def to_dict(self) -> dict[str, Any]:
        values = vars(self) | {"agreements": [a.to_dict() for a in self.agreements]}
        return values | {"result": self.result}


def check_bundle(
    bundle: Bundle, backend: Backend, components: Sequence[str] = (), precision: str | None = None
) -> Iterator[GraphCheck]:
    """Checks every graph of the bundle in every precision that the backend computes it in, or
    those of some components or one precision.

    What cannot be checked is refused before anything runs: RequestError for an unknown component,
    BackendError for a precision that the backend does not have, BundleError for a component
    without probes or without the graph for it. Then one engine at a time is in memory. Components
    that the bundle was exported without are skipped, unless named.
    """
    if unknown := [name for name in components if name not in bundle.components]:
        raise RequestError(
            "component",
            f"unknown component {unknown[0]!r}; one of {', '.join(bundle.components)}",
        )
    there = {name for name in bundle.components if bundle.manifest.precisions.get(name)}
    wanted: dict[str, tuple[str, ...]] = {}
    for name in bundle.components:
        if name in components or (not components and name in there):
            wanted[name] = _precisions(bundle, backend, name, precision)
            component_probes(bundle, name)  # again when their turn comes: they are not kept
        elif not components:
            wanted[name] = ()
    if not any(wanted.values()):
        raise BundleError(f"{bundle.path}: holds no graph to check; export it without --only")
    return _checks(bundle, backend, wanted)


def _checks(
    bundle: Bundle, backend: Backend, wanted: dict[str, tuple[str, ...]]
) -> Iterator[GraphCheck]:
    for name, precisions in wanted.items():
        if not precisions:
            yield GraphCheck(name, "", skipped=ABSENT)
        for precision in precisions:
            yield check_component(bundle, backend, name, precision)


def check_component(bundle: Bundle, backend: Backend, name: str, precision: str) -> GraphCheck:
    """Loads one graph, runs its probes, closes it. Whatever goes wrong there is a finding."""
    if precision not in (*backend.precisions, *backend.on_request):
        why = NO_ARRAYS if precision == "bf16" else UNREAD.format(backend.name)
        return GraphCheck(name, precision, skipped=why)
    probes = component_probes(bundle, name)
    graph = bundle_graph(bundle, name, backend.graph_precision(precision))
    computed, runner, found, problem = "", backend.name, list[Agreement](), ""
    try:
        loaded = backend.load(graph, precision)
        with closing(loaded) as engine:
            computed, info = engine.info.precision, engine.info
            runner = f"{info.backend} {info.version} on {info.device}"
            for agreements in replay(engine, probes, PRECISIONS[precision], runner):
                found += agreements
    except Exception as error:  # an altered graph can make a backend raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    return GraphCheck(name, precision, computed, runner, tuple(found), problem)


def replay(engine: Engine, probes: Probes, compute: str, runner: str) -> Iterator[list[Agreement]]:
    """The agreements of each case, within the tolerance of `compute`."""
    component = engine.component
    for case, reference in probes:
        feeds = in_compute_type(component, probe_inputs(component, case), engine.compute)
        yield compare(component, compute, case, engine.run(feeds), reference, runner)


def component_probes(bundle: Bundle, name: str) -> Probes:
    """The stored cases; raises BundleError unless each has all outputs in the contract's shapes.

    A file without cases, or with empty outputs, would let every engine pass.
    """
    file = bundle.path / _probe_file(bundle, name)
    probes = load_probes(file)
    for case, reference in probes:
        shapes = {output: values.shape for output, values in reference.items()}
        if shapes != _output_shapes(bundle.components[name], case, bundle.vae_factor):
            raise BundleError(
                f"{file}: does not hold the outputs of {name} at {case.sizes}; "
                "export the bundle again"
            )
    if not probes:
        raise BundleError(f"{file}: holds no case; export the bundle again")
    return probes


def _output_shapes(
    component: Component, case: ProbeCase, side_factor: int
) -> dict[str, tuple[int, ...]] | None:
    """None for a case that does not give every axis of the component a size."""
    sizes, axes = case.sizes, {a for s in component.inputs for a in s.axes if isinstance(a, str)}
    if not isinstance(sizes, dict) or set(sizes) != axes:
        return None
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return None
    # As in Engine.output_sizes: the sides of pictures follow from those of latents.
    sizes = sizes | {side.upper(): sizes[side] * side_factor for side in axes & {"h", "w"}}
    return {
        spec.name: tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
        for spec in component.outputs
    }


def _precisions(
    bundle: Bundle, backend: Backend, name: str, precision: str | None
) -> tuple[str, ...]:
    """What to check: the bundle's graphs, and what else the backend computes from one of them.

    The bundle's own BundleError if there is none, the backend's BackendError for another precision.
    """
    there = bundle.manifest.precisions.get(name, ())
    if precision is not None or not there:
        chosen = precision or backend.precisions[0]
        bundle.graph(name, backend.graph_precision(chosen))
        return (chosen,)
    computed = [p for p in backend.precisions if backend.graph_precision(p) in there]
    if not computed:
        raise BundleError(
            f"{bundle.path}: {name} has no graph that can be checked, only {', '.join(there)}; "
            "export the bundle again with --fp16, --fp32 or --bf16, which all give fp32 graphs"
        )
    return tuple(dict.fromkeys((*there, *computed)))


def _probe_file(bundle: Bundle, name: str) -> str:
    if name not in bundle.manifest.probes:
        others = ", ".join(n for n in bundle.components if n in bundle.manifest.probes) or "none"
        raise BundleError(
            f"{bundle.path}: no golden probes for {name}; export the bundle again, or name "
            f"components that have some with --component ({others})"
        )
    return bundle.manifest.probes[name]
