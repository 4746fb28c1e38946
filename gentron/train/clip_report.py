"""What gentron-eval found, as a folder: report.json, report.md, the clips as pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gentron.train.clip_pictures import Shown, write_sheet, write_strips, write_sweep_sheet
from gentron.train.clip_score import GROUPS, OTHER_PROMPT, ClipVerdict, summary
from gentron.train.clips import MOTIONS
from gentron.train.report import REPORT, REPORT_TEXT, write_text
from gentron.train.tables import Rows, interval, markdown, paragraphs, percent, setting_rows

FILMS, SWEEP = "films.webp", "motion-scales.webp"
SHEET_COLUMNS = len(MOTIONS)  # a motion in each column, as the prompts are laid out
GENERATED = "generated"
# What the means of a summary are called, and how they are written.
MEANS = {
    "steadiness": ("steadiness of its look", "{:.3f}"),
    "distance": ("distance from the thing's template", "{:.3f}"),
    "strength": ("amount of motion", "{:.2f}"),
    "size": ("size", "{:.2f}"),
    "off_centre": ("distance from the centre", "{:.2f}"),
}

EXPLAINED = f"""\
*generated*: the model's clips. *real*: true renderings of the same prompts, moving as in training:
what the evaluator itself gets right. *autoencoder*: those through the model's own autoencoder, the
best that any denoiser could reach with it. *still*: the same things standing still. *noise*: random
pixels. *{OTHER_PROMPT}*: the model's own clips held against another prompt. The last three are what
is had for free.

**Object**: of all nouns of the vocabulary, the one asked for is nearest to the frame; of something
that rotates, at its best angle. **Background**: the border's colour has that name. **Motion**: the
object's ink is followed by centre, area and angle, and what it shows most clearly of the eight
motions is the one asked for; less than half of the least that training showed is standing still.
**Steadiness**: how alike neighbouring frames' cut-outs are, 1 for the same (of what was asked to
rotate, turned back). **Distance**: 0 is the font's own picture. **Amount**: in units of the least
that counts as motion. **Size**, **distance from the centre**: of the picture's side. The evaluator
has seen the font and no generated picture. *95 %*: what other prompts of the kind could have
given."""


class Swept(NamedTuple):
    """One motion scale."""

    scale: float
    verdicts: tuple[ClipVerdict, ...]


class Filmed(NamedTuple):
    """Everything about one bundle; `shown` are the clips of the first seed."""

    label: str  # its name, another one for each bundle of a report
    settings: Mapping[str, Any]
    verdicts: tuple[ClipVerdict, ...]
    others: tuple[ClipVerdict, ...]
    shown: tuple[Shown, ...]
    sweep: tuple[Swept, ...]
    sweep_shown: Mapping[float, tuple[Shown, ...]]


def report_values(
    settings: Mapping[str, Any],
    known: Mapping[str, Sequence[ClipVerdict]],
    models: Sequence[Filmed],
) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "settings": dict(settings),
        "evaluator": {name: summary(verdicts) for name, verdicts in known.items()},
        "models": [_model_values(model) for model in models],
    }


def _model_values(model: Filmed) -> dict[str, Any]:
    return {
        "label": model.label,
        "settings": dict(model.settings),
        GENERATED: summary(model.verdicts),
        OTHER_PROMPT: summary(model.others),
        "seen": {
            motion: dict(
                Counter(v.motion.name for v in model.verdicts if v.prompt.motion == motion)
            )
            for motion in dict.fromkeys(v.prompt.motion for v in model.verdicts)
        },
        "motion_scales": [{"scale": s.scale, **summary(s.verdicts)} for s in model.sweep],
        "clips": [verdict.to_dict() for verdict in model.verdicts],
    }


def _seen(verdicts: Sequence[ClipVerdict]) -> dict[str, dict[str, int]]:
    """Motion asked for -> motion seen -> clips."""
    found: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.prompt.motion, Counter())[verdict.motion.name] += 1
    return {asked: dict(seen) for asked, seen in found.items()}


def write_report(folder: Path, report: Mapping[str, Any], models: Sequence[Filmed]) -> None:
    """Fills an existing folder; report.json last, so that its presence says it is whole."""
    for index, model in enumerate(models):
        write_sheet(folder / _numbered(FILMS, index), model.shown, columns=SHEET_COLUMNS)
        for group in GROUPS:
            if chosen := [s for s in model.shown if s.verdict.prompt.group == group]:
                write_strips(folder / _numbered(f"{group}.png", index), chosen)
    if swept := _swept_columns(models):
        write_sweep_sheet(folder / SWEEP, swept, models[0].settings["seed"])
    write_text(folder / REPORT_TEXT, report_text(report))
    write_text(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _swept_columns(models: Sequence[Filmed]) -> dict[str, tuple[Shown, ...]]:
    several = len(models) > 1
    return {
        f"{model.label} {scale:g}" if several else f"{scale:g}": shown
        for model in models
        for scale, shown in model.sweep_shown.items()
    }


def report_text(report: Mapping[str, Any]) -> str:
    """report.json as Markdown."""
    models = report["models"]
    names = " and ".join(model["label"] for model in models)
    swept = any(model["motion_scales"] for model in models)
    parts = [f"# Films of {names}"]
    for index, model in enumerate(models):
        parts += [in_words(model), f"![]({_numbered(FILMS, index)})"]
    parts += [
        "Every prompt once, none picked; a motion in each column. Red: another motion, or another "
        "thing in most frames, with what was seen.",
        "## In figures",
        markdown(score_rows(report)),
        EXPLAINED,
        "## By motion",
        markdown(motion_rows(report)),
    ]
    if swept:
        parts += [
            "## Motion-free guidance",
            "The same prompts and seeds at several scales of the second term of equation 6. 1 is "
            "off.",
            *(
                part
                for model in models
                for part in (
                    f"`{model['label']}`:" if len(models) > 1 else "",
                    markdown(sweep_rows(model)),
                )
            ),
            f"![]({SWEEP})",
            "Some prompts by lot.",
        ]
    for group in GROUPS:
        if all(group in model[GENERATED]["groups"] for model in models):
            parts.append(f"## Frame by frame: {_group_name(group)}")
            parts += [f"![]({_numbered(f'{group}.png', k)})" for k in range(len(models))]
    parts.append("The line is the path of the object's centre, as the evaluator follows it.")
    for model in (report, *models):
        parts += ["## Settings" if model is report else "", markdown(setting_rows(model), left=2)]
    return paragraphs(parts)


def in_words(model: Mapping[str, Any]) -> str:
    """The result as a sentence or two."""
    groups, name = model[GENERATED]["groups"], model["label"]
    everything = groups["all"]
    text = (
        f"Asked for {everything['clips']} clips, `{name}` shows the thing asked for in "
        f"**{percent(everything['object'])}** of all frames, on the background asked for in "
        f"**{percent(everything['background'])}**."
    )
    told = {"trained": "that training showed", "unseen": "that no training clip had"}
    moves = [
        f"**{percent(groups[g]['motion'])}** of the pairs of thing and motion {told[g]}"
        for g in GROUPS
        if g in groups
    ]
    return f"{text} It moves as asked in {' and in '.join(moves)}."


def score_rows(report: Mapping[str, Any]) -> Rows:
    """One line for each thing that was measured; the models first, then what is known."""
    models = report["models"]
    several = len(models) > 1
    columns: dict[str, Mapping[str, Any]] = {}
    for model in models:
        columns[model["label"] if several else GENERATED] = model[GENERATED]
    columns |= report["evaluator"]
    columns[OTHER_PROMPT] = models[0][OTHER_PROMPT]
    rows = [["", "of", "95 %", *columns]]
    first = next(iter(columns.values()))
    lines = [("object", "all", "frames"), ("background", "all", "frames")]
    lines += [("motion", group, "clips") for group in GROUPS if group in first["groups"]]
    for check, group, unit in lines:
        clips = first["groups"][group]["clips"]
        label = check if group == "all" else f"{check}, {_group_name(group)}"
        shares = [c["groups"][group][check] for c in columns.values()]
        # Frames of a clip are not independent: the interval is that of the clips.
        rows.append([label, f"{clips} {'clips, by frame' if unit == 'frames' else unit}",
                     interval(shares[0], clips), *map(percent, shares)])  # fmt: skip
    for key, (label, form) in MEANS.items():
        rows.append([label, "", "", *(form.format(c[key]) for c in columns.values())])
    return rows


def motion_rows(report: Mapping[str, Any]) -> Rows:
    """For each motion how often it was shown, and what was shown instead."""
    models = report["models"]
    rows = [["asked", "clips"] + ["object", "motion", "seen instead"] * len(models)]
    for motion, values in models[0][GENERATED]["motions"].items():
        row = [MOTIONS[motion], str(values["clips"])]
        for model in models:
            here = model[GENERATED]["motions"][motion]
            instead = [
                f"{MOTIONS.get(name, name)} {count}"
                for name, count in sorted(model["seen"][motion].items(), key=lambda s: -s[1])
                if name != motion
            ]
            row += [percent(here["object"]), percent(here["motion"]), ", ".join(instead)]
        rows.append(row)
    return rows


def sweep_rows(model: Mapping[str, Any]) -> Rows:
    """One line for each motion scale of a model."""
    header = ["scale", "object", "background", *(f"motion, {_group_name(g)}" for g in GROUPS)]
    rows = [header + [label for label, _ in MEANS.values()]]
    for cell in model["motion_scales"]:
        groups = cell["groups"]
        row = [f"{cell['scale']:g}", *(percent(groups["all"][c]) for c in ("object", "background"))]
        row += [percent(groups[g]["motion"]) if g in groups else "" for g in GROUPS]
        rows.append(row + [form.format(cell[key]) for key, (_, form) in MEANS.items()])
    return rows


def _group_name(group: str) -> str:
    return {"trained": "trained pairs", "unseen": "unseen pairs"}[group]


def _numbered(name: str, index: int) -> str:
    """`films.webp` of the first model, `films-2.webp` of the second."""
    stem, dot, suffix = name.rpartition(".")
    return name if index == 0 else f"{stem}-{index + 1}{dot}{suffix}"
