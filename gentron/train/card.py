"""The model card: what a checkpoint is, how it was trained and how good it is, for people."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from gentron.bundle import MANIFEST
from gentron.errors import RequestError
from gentron.train.checkpointing import Run
from gentron.train.report import (
    COLUMNS_EXPLAINED,
    RANDOM_GRID,
    REPORT,
    read_report,
    write_file,
    write_text,
)
from gentron.train.sweep import SWEEP
from gentron.train.tables import (
    category_rows,
    guidance_rows,
    markdown,
    paragraphs,
    score_rows,
    sweep_rows,
)

ABOUT, CARD = "checkpoint.json", "README.md"
PICTURES = "pictures"  # folder of the checkpoint
UNSCORED = (
    "Not scored yet. Export the checkpoint, run `gentron-train score -m BUNDLE --report DIR`, then "
    "`gentron-train card CHECKPOINT --report DIR`, and export again."
)
RECIPE = {  # keys of the provenance
    "autoencoder_images": "pictures that the autoencoder saw",
    "pool_images": "pictures in the pool",
    "denoiser_steps": "steps of the denoiser",
    "batch": "pictures in each step",
    "video_clips": "clips in the pool",
    "video_steps": "steps on pictures and clips together",
    "video_image_share": "share of these that see pictures",
    "video_motion_free": "share of clips that are motion-free",
    "seed": "seed",
}
GOING_ON = {  # the same of the video runs that went on from there, behind the run's name
    "steps": "steps on pictures and clips together",
    "lead": "of these, the first ones, on the ends of clips alone",
    "image_share": "share of the others that see pictures",
    "clip_batch": "clips in a step that sees clips",
    "image_batch": "pictures in a step that sees pictures",
    "optimizer": "optimizer of the blocks' matrices",
    "hard_nouns": "nouns that half of the pictures show, those drawn worst",
    "teacher": "run whose model taught pictures",
    "clips": "clips in the pool",
}


def write_card(
    checkpoint: Path,
    report: Path | None = None,
    *,
    hours: float | None = None,
    hardware: str | None = None,
) -> list[Path]:
    """Writes README.md, and the picture it shows; returns the files.

    Without a report the card says that there is none. `hours` come from the training logs in the
    checkpoint's parent folder where they are not given, `hardware` from this machine. Raises
    RequestError for a folder that is no checkpoint, and for a report of another one.
    """
    about = _about(checkpoint)
    values = None if report is None else read_report(report)
    if report is not None and values is not None:
        _check_same(checkpoint, about["provenance"], report, values)
    sweep = _sweep(report, values) if report is not None and values is not None else None
    written = [checkpoint / CARD]
    pictures = checkpoint / PICTURES / RANDOM_GRID
    if report is not None:
        source = report / RANDOM_GRID
        if not source.is_file():
            raise RequestError(
                "report", f"{source}: not found; make it again with gentron-train score"
            )
        pictures.parent.mkdir(exist_ok=True)
        write_file(pictures, lambda partial: shutil.copyfile(source, partial))
        written.append(pictures)
    nouns = (checkpoint / "nouns.txt").read_text("utf-8").splitlines()
    if hours is None:
        images = about["provenance"].get("autoencoder_images")
        hours = training_hours(checkpoint.resolve().parent, images) if images else None
    text = Template(files("gentron.train").joinpath("model_card", CARD).read_text("utf-8"))
    filled = text.substitute(
        nouns=len(nouns),
        pictures=_pictures_text(values),
        training=training_text(
            about["provenance"],
            hours,
            hardware or about["provenance"].get("hardware") or this_machine(),
        ),
        scores=UNSCORED if values is None else scores_text(values, sweep),
    )
    write_text(checkpoint / CARD, filled)
    return written


def training_text(provenance: Mapping[str, Any], hours: float | None, hardware: str) -> str:
    took = "not recorded"
    if hours is not None:
        took = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} minutes"
    rows = [["", ""], ["hardware", hardware], ["time, without drawing the pool", took]]
    rows += [[label, f"{provenance[key]:,}"] for key, label in RECIPE.items() if key in provenance]
    own = [key.removesuffix("_motion_free") for key in provenance if key.endswith("_motion_free")]
    for run in own:
        for key, label in GOING_ON.items():
            if run != "video" and f"{run}_{key}" in provenance:
                rows.append([f"`{run}`: {label}", _shown(provenance[f"{run}_{key}"])])
    return markdown(rows, left=2)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def scores_text(report: Mapping[str, Any], sweep: Mapping[str, Any] | None) -> str:
    settings, groups = report["settings"], category_rows(report)
    parts = [
        f"By `gentron-train score` with {settings['solver']}, {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}, seed {settings['seed']}"
        + (f"; at most {settings['sample']} prompts of each set" if settings["sample"] else "")
        + ".",
        markdown(score_rows(report, intervals=True), left=2),
        COLUMNS_EXPLAINED,
        "First choices by category:" if groups else "",
        markdown(groups) if groups else "",
    ]
    if sweep is not None:
        swept = sweep["settings"]
        parts += [
            f"First choices among {swept['sample']} nouns by solver and steps, at guidance "
            f"{swept['guidance']:g}:",
            markdown(sweep_rows(sweep)),
            f"By guidance, with {swept['solver']} and {swept['steps']} steps:",
            markdown(guidance_rows(sweep)),
        ]
    return paragraphs(parts).rstrip()


def training_hours(folder: Path, autoencoder_images: int) -> float | None:
    """Of autoencoder, denoiser and, if there was one, the video run together, by their logs; None
    where there are none."""
    autoencoder, denoiser, video = (
        Run(folder, name).history() for name in ("autoencoder", "denoiser", "video")
    )
    if not autoencoder or not denoiser:
        return None
    batch = autoencoder_images / autoencoder[-1]["step"]
    seconds = sum(
        steps * batch / row["images_per_second"] for steps, row in _stretches(autoencoder)
    )
    for log in (denoiser, video):
        seconds += sum(steps * row["seconds_per_step"] for steps, row in _stretches(log))
    return seconds / 3600


def _stretches(log: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps since the line before; a run that was stopped repeats a few, which count once."""
    done = 0
    for row in log:
        yield max(0, row["step"] - done), row
        done = max(done, row["step"])


def this_machine() -> str:
    """Number and name of the processor's cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({name}), no GPU"


def _about(checkpoint: Path) -> dict[str, Any]:
    if (checkpoint / MANIFEST).is_file():
        raise RequestError(
            "checkpoint",
            f"{checkpoint}: a bundle, whose manifest holds the digest of its card; give the "
            "checkpoint that it was exported from, and export that again",
        )
    try:
        about: dict[str, Any] = json.loads((checkpoint / ABOUT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            "checkpoint",
            f"{checkpoint}: no readable {ABOUT} ({error}); give the folder that gentron-train "
            "emoji wrote",
        ) from error
    return about


def _check_same(
    checkpoint: Path, provenance: Mapping[str, Any], report: Path, values: Mapping[str, Any]
) -> None:
    scored = values["settings"]["provenance"]
    if scored != provenance:
        differing = sorted(
            key for key in scored | provenance if scored.get(key) != provenance.get(key)
        )
        raise RequestError(
            "report",
            f"{report}: of another training than {checkpoint} ({', '.join(differing)} differ); "
            "export this checkpoint, and score that bundle",
        )


def _sweep(report: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """sweep.json beside the report; None if there is none."""
    file = report / SWEEP
    if not file.is_file():
        return None
    try:
        sweep: dict[str, Any] = json.loads(file.read_text("utf-8"))
        same = sweep["settings"]["tensors"] == values["settings"]["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            "report", f"{file}: cannot be read ({error}); remove it, or sweep again"
        ) from error
    if not same:
        raise RequestError(
            "report",
            f"{file}: of other weights than {report / REPORT}; remove it, or sweep that bundle",
        )
    return sweep


def _pictures_text(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "No pictures yet: they come with the scores."
    shown = sum(result["asked"] for result in values["sets"].values())
    return (
        f"![random prompts and what was drawn for them]({PICTURES}/{RANDOM_GRID})\n\n"
        f"Drawn by lot from the {shown} pictures that were scored, not picked. Black: recognised\n"
        "as what was asked for; red: not, with what it was taken for."
    )
