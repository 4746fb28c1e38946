"""A folder that says how good a model is: report.json, report.md, the worst and random pictures."""

from __future__ import annotations

import json
import os
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from gentron.errors import OutputError, RequestError
from gentron.train.prompts import SIZES, noise_seed
from gentron.train.score import BY_CATEGORY, GENERATED, OTHER_PROMPT, SetScore, by_category, worst
from gentron.train.tables import (
    MEANING,
    category_rows,
    markdown,
    paragraphs,
    score_rows,
    setting_rows,
    size_rows,
)

REPORT, REPORT_TEXT = "report.json", "report.md"
RANDOM_GRID, WORST_GRID = "random.png", "worst.png"
NUM_RANDOM, RANDOM_COLUMNS = 36, 6
NUM_WORST, WORST_COLUMNS = 20, 5
LABEL_HEIGHT, LABEL_LETTERS = 38, 23  # pixels; letters to a line of a label

Picture = npt.NDArray[np.uint8]  # [H, W, 3]
PictureOf = Callable[[str, int], Picture]  # (set, row)

COLUMNS_EXPLAINED = """\
*generated*: the model's pictures. *real*: true renderings of the same prompts at sizes and places
the scorer's templates were not made at, so what the scorer itself gets right. *autoencoder*: those
through the model's own autoencoder, the best that any denoiser could reach with it. *noise*:
random pixels. *other prompt's*: the model's own pictures held against another prompt of the set.
The last two are what is had for free.

*first choice*: of all nouns of the vocabulary the one asked for is nearest. *95 %*: what another
sample of such prompts could have given. The scorer has never seen a generated picture."""


def report_values(settings: Mapping[str, Any], results: Sequence[SetScore]) -> dict[str, Any]:
    """What report.json holds."""
    return {"settings": dict(settings), "sets": {r.name: _set_values(r, settings) for r in results}}


def _set_values(result: SetScore, settings: Mapping[str, Any]) -> dict[str, Any]:
    # The model first, then what is known, then what is had for free.
    known = [column for column in result.verdicts if column not in (GENERATED, OTHER_PROMPT)]
    columns = [GENERATED, *known, OTHER_PROMPT]
    values: dict[str, Any] = {
        "asked": result.count,
        "columns": {column: result.shares(column) for column in columns},
        "categories": {},
    }
    if result.name in BY_CATEGORY:
        values["categories"] = {
            name: {"asked": count, **shares}
            for name, (count, shares) in by_category(result).items()
        }
    if result.name == "sizes":
        values["mean_sizes"] = {
            word: {column: _mean_size(result, column, word) for column in columns[:-1]}
            for word in SIZES
        }
    seed = settings["seed"]
    values["pictures"] = [
        {**verdict.to_dict(), "seed": noise_seed(verdict.prompt.text, seed)}
        for verdict in result.verdicts[GENERATED]
    ]
    return values


def _mean_size(result: SetScore, column: str, word: str) -> float:
    found = [v.size for v in result.verdicts[column] if v.prompt.size == word]
    return round(sum(found) / max(1, len(found)), 3)


def report_text(report: Mapping[str, Any]) -> str:
    """report.json as Markdown."""
    settings = report["settings"]
    sets = "\n".join(
        f"- `{name}`, {result['asked']} prompts: {MEANING[name]}, such as "
        f"*{result['pictures'][0]['prompt']}*"
        for name, result in report["sets"].items()
    )
    sizes, groups = size_rows(report), category_rows(report)
    return paragraphs(
        [
            f"# Score of {settings['bundle']}",
            markdown(score_rows(report, intervals=True), left=2),
            COLUMNS_EXPLAINED,
            sets,
            "## Measured sizes" if sizes else "",
            markdown(sizes) if sizes else "",
            "## First choices by category" if groups else "",
            markdown(groups) if groups else "",
            f"## Random pictures\n\nDrawn by lot from all sets, not picked.\n\n![]({RANDOM_GRID})",
            f"## The worst\n\nFarthest from what was asked for.\n\n![]({WORST_GRID})",
            "## Settings",
            markdown(setting_rows(report), left=2),
        ]
    )


def write_report(
    folder: Path,
    settings: Mapping[str, Any],
    results: Sequence[SetScore],
    picture: PictureOf,
) -> None:
    """Fills an existing folder; report.json last, so that its presence says it is whole."""
    report = report_values(settings, results)
    for name, rows, columns in (
        (RANDOM_GRID, drawn_by_lot(results, NUM_RANDOM, settings["seed"]), RANDOM_COLUMNS),
        (WORST_GRID, worst(results, NUM_WORST), WORST_COLUMNS),
    ):
        labels = [_label(results, *row) for row in rows]
        grid = labelled_grid([picture(*row) for row in rows], labels, columns=columns)
        write_file(folder / name, lambda file, grid=grid: grid.save(file, "PNG"))
    write_text(folder / REPORT_TEXT, report_text(report))
    write_text(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a folder; raises RequestError that says how to make one."""
    file = folder / REPORT
    try:
        report = json.loads(file.read_text("utf-8"))
        if not report["sets"] or not isinstance(report["settings"]["provenance"], dict):
            raise ValueError("it is not a score report")
    except FileNotFoundError as error:
        raise RequestError(
            "report", f"{file}: not found; run: gentron-train score -m BUNDLE --report {folder}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            "report", f"{file}: cannot be read ({error}); make it again with gentron-train score"
        ) from error
    return report


def report_folder(folder: Path) -> Path:
    """Makes the folder, before anything is drawn for it; raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made a folder: {error.strerror}; choose another --report"
        ) from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: not writable; choose another --report")
    return folder


def write_text(file: Path, text: str) -> None:
    write_file(file, lambda partial: partial.write_text(text, "utf-8"))


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Replaces `file` by what `write` puts at the path it is given, or leaves it as it was."""
    partial = file.with_name(f".{file.name}.part")
    try:
        write(partial)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{file}: cannot be written: {error.strerror}; free some space or choose another folder"
        ) from error


def drawn_by_lot(results: Sequence[SetScore], count: int, seed: int) -> list[tuple[str, int]]:
    """(set, row) of generated pictures."""
    rows = [(result.name, row) for result in results for row in range(result.count)]
    return random.Random(f"grid {seed}").sample(rows, min(count, len(rows)))


def _label(results: Sequence[SetScore], name: str, row: int) -> tuple[str, bool]:
    """The prompt and what was seen instead, and whether its headline check is right."""
    (verdict,) = (r.verdicts[GENERATED][row] for r in results if r.name == name)
    saw = " + ".join(verdict.saw)
    right = verdict.checks["object"]
    return (verdict.prompt.text if right else f"{verdict.prompt.text} ({saw})"), right


def labelled_grid(
    pictures: Sequence[Picture], labels: Sequence[tuple[str, bool]], *, columns: int
) -> Image.Image:
    """Pictures with a label below each; the label of a wrong one is red."""
    side = 128
    columns = min(columns, len(pictures))
    cell = side + LABEL_HEIGHT
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (side + 4) + 4, rows * (cell + 4) + 4), "white")
    pen, typeface = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for index, (pixels, (label, right)) in enumerate(zip(pictures, labels, strict=True)):
        x, y = 4 + index % columns * (side + 4), 4 + index // columns * (cell + 4)
        canvas.paste(Image.fromarray(pixels).resize((side, side)), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgrey")
        lines = textwrap.wrap(label, LABEL_LETTERS, max_lines=3, placeholder="...")
        color = "black" if right else "firebrick"
        pen.multiline_text((x, y + side + 1), "\n".join(lines), color, typeface, spacing=1)
    return canvas
