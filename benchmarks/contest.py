"""What the scripts of this folder share: contenders in turn, ratios, a table."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gentron.bench.contender import Contender, in_turns
from gentron.bench.machine import machine_facts
from gentron.bench.peers import environment

Check = Callable[[str, str, Any, Any], None]  # (name, precision, its outputs, the last one's)
COLUMNS = ("contender", "median", "fastest", "the last by it", "smallest and largest", "memory")


def contest(
    script: str,
    asked: Sequence[dict[str, Any]],
    rounds: int,
    seconds: float,
    folder: Path,
    check: Check | None = None,
) -> list[dict[str, Any]]:
    """Starts `script --worker` for each of `asked` (what it is to be, with `name`); all take turns.
    The last one is what the others are compared with. Rows as JSON values."""
    with ExitStack() as stack:
        contenders = []
        for number, one in enumerate(asked):
            name, precision = str(one["name"]), str(one.get("precision", ""))
            kind = "torch" if name.startswith(("torch", "diffusers")) else name
            command = [sys.executable, script, "--worker"]
            contender = Contender(
                f"{name} {precision}".strip(), command, json.dumps(one),
                folder / f"{number}.log", environment(kind, int(one.get("threads", 1))),
            )  # fmt: skip
            sys.stderr.write(f"{contender.name} is getting ready\n")
            contenders.append(stack.enter_context(contender))
        if check is not None:
            outputs = [_load(c, folder / f"{i}.npz") for i, c in enumerate(contenders)]
            for one, found in zip(asked[:-1], outputs, strict=False):
                check(str(one["name"]), str(one.get("precision", "")), found, outputs[-1])
        in_turns(contenders, rounds, seconds)
    return [row(contender, contenders[-1]) for contender in contenders]


def row(contender: Contender, last: Contender) -> dict[str, Any]:
    times = [t for round_ in contender.rounds for t in round_]
    pairs = zip(last.rounds, contender.rounds, strict=True)
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    return {
        "name": contender.name,
        **contender.facts,
        "median_s": statistics.median(times),
        "min_s": min(times),
        "calls": len(times),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "peak_bytes": contender.peak_bytes,
        "machine": machine_facts(),
    }


def markdown(title: str, rows: Sequence[dict[str, Any]], rounds: int, unit: str = "s") -> str:
    scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
    machine = machine_facts()
    lines = [f"{title}; {rounds} rounds in turn", ""]
    lines += [f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}"]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for found in rows:
        low, high = found["ratio_range"]
        lines.append(
            f"| {found['label']} | {found['median_s'] * scale:.4g} {unit} | "
            f"{found['min_s'] * scale:.4g} {unit} | {found['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {found['peak_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _load(contender: Contender, file: Path) -> dict[str, Any]:
    with np.load(contender.outputs(file)) as values:
        return dict(values)
