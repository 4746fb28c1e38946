"""What judging pictures and judging films have in common: the font's scorer, facts, a bar."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gentron
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.bundle import FileEntry
    from gentron.runtime import Pipeline
    from gentron.train.scorer import TemplateScorer


def need_train() -> None:
    """Raises RequestError that says what to install."""
    try:
        import torch  # noqa: F401

        import gentron.train.checkpoint  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "train", f"cannot import {error.name}; run: pip install 'gentron[train]'"
        ) from error


def font_scorer(font: Path | None, names: Sequence[str]) -> tuple[TemplateScorer, str]:
    """The scorer, and the sha256 of the font it has seen."""
    import torch

    from gentron.train.scenes import find_font, load_sprites
    from gentron.train.scorer import TemplateScorer

    torch.set_num_threads(1)  # its operations are small, and the pipeline needs the cores
    file = find_font(font)
    return (
        TemplateScorer(load_sprites(file, names), names),
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def bundle_settings(pipe: Pipeline, names: Sequence[str], font: str) -> dict[str, Any]:
    """What was judged, and by what: for a report."""
    manifest = pipe.bundle.manifest
    return {
        "bundle": manifest.name,
        "digest": pipe.bundle.digest,
        "weights": manifest.weights,
        "tensors": _tensors_digest(manifest.files),
        "provenance": manifest.provenance,
        "nouns": len(names),
        "font": font,
        "gentron": gentron.__version__,
    }


def _tensors_digest(files: Mapping[str, FileEntry]) -> str:
    """Of the stored weights alone: the same after an export that changed only the model card."""
    stored = sorted(
        (name, entry.sha256)
        for name, entry in files.items()
        if name.endswith(".safetensors") and not name.startswith("probes/")
    )
    return hashlib.sha256(repr(stored).encode()).hexdigest()


@contextmanager
def part_progress(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error with the time left; a line for each part where it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        current, before = "", 0

        def advance(part: str, done: int, of: int) -> None:
            nonlocal current, before
            step = done - before if part == current else done
            current, before = part, done
            bar.update(task, description=part, advance=step)
            if done == of and not console.is_terminal:
                console.print(f"{part}: {of}", markup=False, highlight=False)

        yield advance
