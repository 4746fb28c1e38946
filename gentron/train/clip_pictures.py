"""Clips as pictures: side by side and moving, or frame after frame with the object's path."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from gentron.train.clip_score import ClipVerdict
from gentron.train.clips import MOTIONS
from gentron.train.report import write_file

Clip = npt.NDArray[np.uint8]  # [F, H, W, 3]
TILE, GAP = 112, 6  # pixels of a clip's side on a sheet, and between clips
LABEL, LETTERS = 50, 21  # pixels under a tile; letters to a line of a label
STRIP, STRIP_LABEL = 72, 190  # pixels of a frame's side in a strip, and of its label
FRAME_MS, LAST_MS = 125, 700  # how long a frame stays, and the last one before it starts again
SWEPT_ROWS = 6  # prompts on the sheet of motion scales
INK, WRONG, FAINT = "black", "firebrick", "lightgrey"


class Shown(NamedTuple):
    """A clip, what it was judged to be, and where its object was in each frame that shows one."""

    clip: Clip
    verdict: ClipVerdict
    places: tuple[tuple[float, float], ...]


def complaint(verdict: ClipVerdict) -> str:
    """What is wrong with a clip, in a few words; empty if nothing is."""
    found = []
    if not verdict.moves:
        seen = verdict.motion.name
        found.append(MOTIONS.get(seen, seen))
    wrong = [name for name in verdict.saw if name != verdict.prompt.noun]
    if len(wrong) > len(verdict.saw) / 2:
        found.append(max(dict.fromkeys(wrong), key=wrong.count))
    return ", ".join(found)


def write_sheet(file: Path, shown: Sequence[Shown], *, columns: int) -> None:
    """All clips at once, moving; red where the motion or the thing is another one."""
    cells = [(s.clip, s.verdict.prompt.text, complaint(s.verdict)) for s in shown]
    _write_animation(file, _sheet(cells, columns, header=()))


def write_sweep_sheet(file: Path, swept: Mapping[str, Sequence[Shown]], seed: int) -> None:
    """Some prompts drawn by lot, one a row; one column for each of `swept`, which heads it."""
    by_lot = random.Random(f"sweep {seed}")
    count = min(map(len, swept.values()))
    rows = sorted(by_lot.sample(range(count), min(SWEPT_ROWS, count)))
    cells = [
        (shown[row].clip, shown[row].verdict.prompt.text, complaint(shown[row].verdict))
        for row in rows
        for shown in swept.values()
    ]
    _write_animation(file, _sheet(cells, len(swept), header=tuple(swept)))


def write_strips(file: Path, shown: Sequence[Shown]) -> None:
    """A row for each clip: what was asked, then every frame with the object's path up to it."""
    count = max(len(s.clip) for s in shown)
    width = STRIP_LABEL + count * (STRIP + 2) + GAP
    canvas = Image.new("RGB", (width, len(shown) * (STRIP + GAP) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (clip, verdict, places) in enumerate(shown):
        top = GAP + row * (STRIP + GAP)
        _label(pen, (GAP, top + 6), verdict.prompt.text, complaint(verdict), letters=32)
        for k, frame in enumerate(clip):
            left = STRIP_LABEL + k * (STRIP + 2)
            canvas.paste(_small(frame, STRIP), (left, top))
            pen.rectangle((left - 1, top - 1, left + STRIP, top + STRIP), outline=FAINT)
            if len(places) == len(clip):
                _path(pen, [(left + x * STRIP, top + y * STRIP) for x, y in places[: k + 1]])
    write_file(file, lambda partial: canvas.save(partial, "PNG"))


def _path(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]]) -> None:
    if len(points) > 1:
        pen.line(points, fill="white", width=3)
        pen.line(points, fill=INK, width=1)
    x, y = points[-1]
    pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill="white", outline=INK)


def _sheet(
    cells: Sequence[tuple[Clip, str, str]], columns: int, *, header: tuple[str, ...]
) -> list[Image.Image]:
    """One picture for each frame; a clip that is shorter stays on its last."""
    columns = min(columns, len(cells))
    top = 20 if header else 0
    wide, high = TILE + GAP, TILE + LABEL + GAP
    size = (columns * wide + GAP, top + -(-len(cells) // columns) * high + GAP)
    paper = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(paper)
    for column, text in enumerate(header):
        pen.text((GAP + column * wide, 6), text, INK, ImageFont.load_default(12))
    corners = [
        (GAP + k % columns * wide, top + GAP + k // columns * high) for k in range(len(cells))
    ]
    for (x, y), (_, text, wrong) in zip(corners, cells, strict=True):
        _label(pen, (x, y + TILE + 1), text, wrong, letters=LETTERS)
        pen.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=WRONG if wrong else FAINT)
    frames = []
    for k in range(max(len(clip) for clip, _, _ in cells)):
        frame = paper.copy()
        for corner, (clip, _, _) in zip(corners, cells, strict=True):
            frame.paste(_small(clip[min(k, len(clip) - 1)], TILE), corner)
        frames.append(frame)
    return frames


def _label(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, wrong: str, *, letters: int
) -> None:
    typeface = ImageFont.load_default(10)
    lines = textwrap.wrap(text, letters, max_lines=3, placeholder="...")
    pen.multiline_text(corner, "\n".join(lines), INK, typeface, spacing=1)
    if wrong:
        below = (corner[0], corner[1] + 12 * len(lines) + 1)
        seen = textwrap.shorten(f"seen: {wrong}", letters + 2, placeholder="...")
        pen.text(below, seen, WRONG, typeface)


def _small(frame: Clip, side: int) -> Image.Image:
    return Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)


def _write_animation(file: Path, frames: Sequence[Image.Image]) -> None:
    first, *others = frames
    times = [FRAME_MS] * len(others) + [LAST_MS]
    write_file(
        file,
        lambda partial: first.save(
            partial, "WEBP", save_all=True, append_images=others, duration=times, loop=0,
            quality=80, method=6,
        ),
    )  # fmt: skip
