"""A freshly compiled engine against its graph's golden probes, before anything else may use it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gentron.agreement import TOLERANCES, compare
from gentron.contract import PRECISIONS
from gentron.engines.base import Engine, Graph
from gentron.engines.compiler import Facts
from gentron.engines.shapes import Profile, contains
from gentron.errors import BackendError
from gentron.probe import in_compute_type, load_probes, probe_inputs

log = logging.getLogger(__name__)


def prove_profiles(
    engine: Engine, graph: Graph, precision: str, profiles: Sequence[Profile]
) -> Facts:
    """In every profile, the probes that it allows; warns where there is none at all."""
    passed, worst = 0, 0.0
    for profile in profiles:
        found = prove(engine, graph, precision, profile)["probes"]
        passed, worst = passed + found["passed"], max(worst, found["worst_relative"])
    if not passed:
        log.warning(
            f"{graph.component.name}: no golden probe lies within the profiles of this engine, so "
            "nothing shows yet that it computes what torch does; build it with the default profile "
            "as well"
        )
    return {"probes": {"passed": passed, "worst_relative": worst}}


def prove(engine: Engine, graph: Graph, precision: str, profile: Profile | None = None) -> Facts:
    """Runs the probes that lie within the profile; says how many, and the worst error.

    Raises BackendError that names component, output and error where torch computed otherwise.
    """
    component, worst, passed = graph.component, 0.0, 0
    for case, reference in load_probes(graph.probes) if graph.probes else ():
        if profile is not None and not contains(profile, case.sizes):
            continue
        feeds = in_compute_type(component, probe_inputs(component, case), engine.compute)
        found = compare(
            component, PRECISIONS[precision], case, engine.run(feeds), reference,
            f"{engine.info.backend} {engine.info.version}",
        )  # fmt: skip
        for agreement in found:
            if not agreement.passed and precision == "int8":
                allowed = TOLERANCES["int8"]
                raise BackendError(
                    f"int8: weights of 8 bits cost {component.name} too much: {agreement.output} "
                    f"is off by {agreement.max_relative:.1e} of its range (cosine "
                    f"{agreement.cosine:.6f}), {allowed.max_relative:g} is allowed (at least "
                    f"{allowed.cosine:g}); leave --int8 out"
                )
            if not agreement.passed:
                raise BackendError(
                    f"{engine.info.backend}: the compiled {component.name} is not what torch "
                    f"computes: {agreement.output} is off by {agreement.max_relative:.1e} of its "
                    f"range in {precision}; use another --precision or --backend, and tell us"
                )
            worst = max(worst, agreement.max_relative)
        passed += 1
    return {"probes": {"passed": passed, "worst_relative": worst}}
