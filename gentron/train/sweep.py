"""Which solver, how many steps, how much guidance: the first-choice score over a grid of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gentron.solvers import SOLVERS
from gentron.train.prompts import Prompt
from gentron.train.report import write_text
from gentron.train.score import Artist, judge_all, see, shares
from gentron.train.scorer import TemplateScorer
from gentron.train.tables import guidance_rows, markdown, paragraphs, setting_rows, sweep_rows

SWEEP, SWEEP_TEXT = "sweep.json", "sweep.md"
STEP_COUNTS = (8, 12, 20, 40)
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
SAMPLE = 120  # nouns, unless told otherwise


class Cell(NamedTuple):
    """One way to sample."""

    solver: str
    steps: int
    guidance: float


def plan(solvers: Sequence[str], default: Cell) -> list[Cell]:
    """Every solver with every step count, then the guidance scales at the default solver."""
    grid = [
        Cell(solver, steps, default.guidance)
        for solver in solvers
        for steps in STEP_COUNTS
        if SOLVERS[solver].only_steps in (None, steps)
    ]
    scales = [default._replace(guidance=scale) for scale in (*GUIDANCES, default.guidance)]
    return list(dict.fromkeys(grid + scales))


def run_sweep(
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    scorer: TemplateScorer,
    model: Callable[[Cell], Artist],
    settings: Mapping[str, Any],
    folder: Path | None,
    watch: Callable[[Cell, int], None] = lambda cell, done: None,
    walk: Callable[[Cell], Hashable] = lambda cell: cell,
) -> dict[str, Any]:
    """Scores every cell. With a folder, each finished cell is kept there and not drawn again.

    Cells of which `walk` says the same draw the same pictures, as DDIM and Euler's method on a flow
    do: they are drawn once.
    """
    found = _kept(folder, settings)
    walked: dict[Hashable, Cell] = {}
    for cell in cells:
        twin = walked.setdefault(walk(cell), cell)
        if twin in found:
            found.setdefault(cell, found[twin])
            watch(cell, len(prompts))
        else:
            seen = []
            for prompt, picture in zip(prompts, model(cell)(prompts), strict=True):
                seen.append(see(scorer, prompt, picture))
                watch(cell, len(seen))
            found[cell] = shares("nouns", judge_all(scorer.names, prompts, seen))
            if folder is not None:
                _write(folder, _values(settings, found))
    sweep = _values(settings, {cell: found[cell] for cell in cells})
    if folder is not None:
        _write(folder, sweep)
    return sweep


def sweep_text(sweep: Mapping[str, Any]) -> str:
    settings = sweep["settings"]
    count = settings["sample"]
    return paragraphs(
        [
            f"# Solvers, steps and guidance of {settings['bundle']}",
            f"Share of {count} nouns, each asked for once, that are the scorer's first choice, at "
            f"guidance {settings['guidance']:g}. One noun is {100 / count:.1f} points.",
            markdown(sweep_rows(sweep)),
            "Among the first five:",
            markdown(sweep_rows(sweep, "first five")),
            f"## Guidance\n\nWith {settings['solver']}, {settings['steps']} steps.",
            markdown(guidance_rows(sweep)),
            "## Settings",
            markdown(setting_rows(sweep), left=2),
        ]
    )


def _values(settings: Mapping[str, Any], found: Mapping[Cell, dict[str, float]]) -> dict[str, Any]:
    cells = [{**cell._asdict(), **result} for cell, result in found.items()]
    return {"settings": dict(settings), "cells": cells}


def _write(folder: Path, sweep: Mapping[str, Any]) -> None:
    write_text(folder / SWEEP_TEXT, sweep_text(sweep))
    write_text(folder / SWEEP, json.dumps(sweep, indent=1, ensure_ascii=False) + "\n")


def _kept(folder: Path | None, settings: Mapping[str, Any]) -> dict[Cell, dict[str, float]]:
    """Cells of an earlier run with the very same settings; none of any other run."""
    if folder is None or not (folder / SWEEP).is_file():
        return {}
    try:
        sweep = json.loads((folder / SWEEP).read_text("utf-8"))
        if sweep["settings"] != json.loads(json.dumps(settings)):
            return {}
        return {Cell(*(cell.pop(field) for field in Cell._fields)): cell for cell in sweep["cells"]}
    except (ValueError, KeyError, TypeError):
        return {}  # of another version: made anew
