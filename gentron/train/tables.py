"""Scores as text: aligned for a terminal, in Markdown for a report and a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]  # the first is the header

MEANING = {
    "nouns": "a noun alone",
    "colors": "on a background colour seen in training",
    "unseen-colors": "on the background colour held out for that noun",
    "pairs": "two nouns",
    "sizes": "a small one, a huge one",
    "places": "on a side or in a corner",
    "synonyms": "words that no caption holds",
}
CHECK_NAMES = {
    "object": "first choice",
    "first five": "among the first five",
    "background": "background colour",
    "all": "all of it right",
    "one of two": "at least one first choice",
    "in order": "both, left and right as asked",
    "size": "size",
    "place": "place",
}
PAIR_OBJECT = "both first choices"


def aligned(rows: Rows, *, left: int = 1) -> str:
    """Columns side by side; those after the first `left` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def markdown(rows: Rows, *, left: int = 1) -> str:
    """A table; columns after the first `left` to the right."""
    header, *body = rows
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(share: float, count: int) -> str:
    """95 % interval of a share (Wilson 1927): what other prompts of the kind could have given."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / 2 / count) ** 2)
    return f"{100 * max(0.0, middle - half):.0f} to {100 * min(1.0, middle + half):.0f} %"


def score_rows(report: Mapping[str, Any], *, intervals: bool = False) -> Rows:
    """One line for each thing that was checked; `report` as in report.json."""
    columns = [*next(iter(report["sets"].values()))["columns"]]
    rows = [["set", "right"] + ["95 %"] * intervals + ["of", *columns]]
    for name, result in report["sets"].items():
        for check in result["columns"][columns[0]]:
            label = PAIR_OBJECT if (name, check) == ("pairs", "object") else CHECK_NAMES[check]
            shares = [result["columns"][column][check] for column in columns]
            between = [interval(shares[0], result["asked"])] * intervals
            rows.append([name, label, *between, str(result["asked"]), *map(percent, shares)])
    return rows


def category_rows(report: Mapping[str, Any]) -> Rows:
    """First choices by category, for the sets with one noun a prompt; the best category first."""
    sets = {name: r["categories"] for name, r in report["sets"].items() if r["categories"]}
    if not sets:
        return []
    leading = next(iter(sets.values()))
    order = sorted(leading, key=lambda name: -leading[name]["object"])
    order += sorted({name for groups in sets.values() for name in groups} - set(order))
    rows = [["category", "of", *sets]]
    for name in order:
        groups = [groups.get(name) for groups in sets.values()]
        count = max(group["asked"] for group in groups if group)
        rows.append([name, str(count), *(percent(g["object"]) if g else "" for g in groups)])
    return rows


def size_rows(report: Mapping[str, Any]) -> Rows:
    """Mean measured sizes: 1 is a picture's side; plain ones were 0.65 to 0.95 in training."""
    sizes = report["sets"].get("sizes", {}).get("mean_sizes")
    if not sizes:
        return []
    columns = [*next(iter(sizes.values()))]
    return [["asked", *columns]] + [
        [word, *(f"{sizes[word][column]:.2f}" for column in columns)] for word in sizes
    ]


def setting_rows(report: Mapping[str, Any]) -> Rows:
    shown = {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for key, value in report["settings"].items()
    }
    return [["setting", "value"]] + [[key, str(value)] for key, value in shown.items()]


def sweep_rows(sweep: Mapping[str, Any], check: str = "object") -> Rows:
    """Solvers down, step counts across."""
    cells = sweep["cells"]
    default = sweep["settings"]["guidance"]
    grid = {(c["solver"], c["steps"]): c[check] for c in cells if c["guidance"] == default}
    solvers = list(dict.fromkeys(solver for solver, _ in grid))
    counts = sorted({steps for _, steps in grid})
    return [["solver", *(f"{steps} steps" for steps in counts)]] + [
        [s, *(percent(grid[s, n]) if (s, n) in grid else "" for n in counts)] for s in solvers
    ]


def guidance_rows(sweep: Mapping[str, Any]) -> Rows:
    """Guidance scales at the default solver and step count."""
    settings = sweep["settings"]
    rows = sorted(
        (cell["guidance"], cell["object"], cell["first five"])
        for cell in sweep["cells"]
        if (cell["solver"], cell["steps"]) == (settings["solver"], settings["steps"])
    )
    return [["guidance", "first choice", "among the first five"]] + [
        [f"{scale:g}", percent(first), percent(five)] for scale, first, five in rows
    ]


def paragraphs(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
