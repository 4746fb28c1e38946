"""Contenders measured in turn, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gentron.agreement import TOLERANCES, compare
from gentron.bench.contender import Contender, in_turns
from gentron.bench.peers import PEERS
from gentron.bench.work import Work
from gentron.bundle import Bundle
from gentron.contract import PRECISIONS
from gentron.errors import BackendError, GenTronError

Say = Callable[[str], None]
MACHINE = "machine"
# Both sides of a comparison may be this far from float32 (`gentron/agreement.py`).
SIDES = 2


@dataclass
class Row:
    """What one contender took for one stage. Times are in seconds, memory in bytes."""

    backend: str
    precision: str
    stage: str
    median_s: float | None
    label: str = ""
    device: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # of the stage's last engine call
    min_s: float | None = None
    spread: float | None = None  # half of the times lie within this share of the median
    calls: int = 0
    samples_per_s: float | None = None
    flops: float | None = None  # of the graphs: ours, for every contender
    peak_share: float | None = None  # of the machine's matrix products in the same rounds
    peak_bytes: int = 0  # of the process, weights included
    prepare_s: float | None = None  # loading and compiling, once
    times_first: float | None = None  # median over the rounds of its time by the first row's
    times_first_range: tuple[float, float] | None = None
    difference: float | None = None  # of outputs from the first row's, by their range
    problem: str = ""  # why there are no numbers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    bundle: Bundle,
    work: Work,
    kinds: Sequence[str],
    *,
    threads: int,
    rounds: int,
    seconds: float,
    logs: Path,
    say: Say,
) -> tuple[list[Row], dict[str, Any]]:
    """A row for each of `kinds`, the first of which all others are held against, and the machine's
    peak in the same rounds. A contender that cannot run has a row that says why."""
    with ExitStack() as stack:
        started, failed = list[Contender](), dict[str, Row]()
        for kind in (*kinds, MACHINE):
            precision = started[0].facts["precision"] if started else work.precision
            asked = work.in_precision(precision)
            if kind in PEERS or kind == MACHINE:
                asked = replace(asked, threads=threads)
            say(f"{work.stage} {precision}: {kind} is getting ready")
            contender = Contender.of(kind, asked, threads, logs / f"{work.stage}-{kind}.log")
            try:
                started.append(stack.enter_context(contender))
            except GenTronError as error:
                failed[kind] = Row(kind, asked.precision, work.stage, None, problem=str(error))
        machine = next((c for c in started if c.name == MACHINE), None)
        timed = [c for c in started if c.name != MACHINE]
        differences = _differences(bundle, work, timed, logs)
        say(f"{work.stage} {work.precision}: {rounds} rounds")
        in_turns(started, rounds, seconds)
    rows = {c.name: _row(c, work, timed[0], machine) for c in timed}
    for kind, difference in differences.items():
        rows[kind].difference = difference
    peak = _peak(machine) if machine else {"problem": failed[MACHINE].problem}
    return [rows.get(kind) or failed[kind] for kind in kinds], peak


def _row(contender: Contender, work: Work, first: Contender, machine: Contender | None) -> Row:
    samples = work.sizes.get("B", work.sizes.get("K", 1))
    times = sorted(t for round_ in contender.rounds for t in round_)
    median = statistics.median(times)
    low, high = np.percentile(times, (25, 75))
    row = Row(
        contender.name,
        contender.facts["precision"],
        work.stage,
        median,
        label=contender.facts["label"],
        device=contender.facts["device"],
        sizes=work.sizes,
        min_s=times[0],
        spread=float(high - low) / 2 / median,
        calls=len(times),
        samples_per_s=samples / median,
        peak_bytes=contender.peak_bytes,
        prepare_s=contender.prepare_s,
    )
    if contender is not first:
        ratios = _by_round(contender, first)
        row.times_first = statistics.median(ratios)
        row.times_first_range = (min(ratios), max(ratios))
    if machine is not None and machine.facts["graph_flops"] is not None:
        row.flops = machine.facts["graph_flops"]
        if row.device == machine.facts["device"]:
            ratio = statistics.median(_by_round(machine, contender))
            row.peak_share = ratio * row.flops / machine.facts["flops"]
    return row


def _by_round(above: Contender, below: Contender) -> list[float]:
    pairs = zip(above.rounds, below.rounds, strict=True)
    return [statistics.median(a) / statistics.median(b) for a, b in pairs]


def _peak(machine: Contender) -> dict[str, Any]:
    times = [t for round_ in machine.rounds for t in round_]
    facts = machine.facts
    return {
        "precision": facts["precision"],
        "flops_per_s": facts["flops"] / statistics.median(times),
        "with": facts["label"],
        "graph_flops_counted": facts["counted"],
    }


def _differences(
    bundle: Bundle, work: Work, timed: Sequence[Contender], folder: Path
) -> dict[str, float]:
    """How far each one's outputs are from the first one's, as a share of their range.

    Raises BackendError if they are too far apart to be the same work. Contenders without outputs
    of this network are left out.
    """
    found: dict[str, float] = {}
    loaded: list[tuple[Contender, dict[str, Any]]] = []
    for contender in timed:
        with np.load(contender.outputs(folder / f"{contender.name}.npz")) as values:
            loaded.append((contender, dict(values)))
    for contender, values in loaded[1:]:
        if not values:
            continue
        worst = 0.0
        for number, call in enumerate(work.calls):
            component = bundle.components[call.component]
            got, wanted = (
                {spec.name: v[f"{number}.{spec.name}"].astype(np.float32)
                 for spec in component.outputs}
                for v in (values, loaded[0][1])
            )  # fmt: skip
            compute = PRECISIONS[contender.facts["precision"]]
            for a in compare(component, compute, call.case, got, wanted, contender.name):
                worst = max(worst, a.max_relative)
                if not a.max_relative <= SIDES * TOLERANCES[compute].max_relative:
                    raise BackendError(
                        f"{contender.name}: its {a.output} of {call.component} is off by "
                        f"{a.max_relative:.1e} of its range from that of {timed[0].name}: not the "
                        "same work, so no figures; run gentron-check"
                    )
        found[contender.name] = worst
    return found
