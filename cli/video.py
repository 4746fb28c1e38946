"""gentron-run video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gentron.cli.common import say, warn
from gentron.cli.drawing import Choice, draw, drawing_options, flags
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime.generation import Generation

DEFAULT_FPS = 8.0  # of the paper's videos (section 4.1)
FORMATS = ("mp4", "mkv", "gif", "webp", "png")


@click.command()
@click.argument("prompt", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help=".mp4, .mkv, .gif, .webp, or a folder.")  # fmt: skip
@click.option("--like", type=click.Path(path_type=Path), help="Make this video again.")
@click.option("--frames", type=int, help="[as many as the model was trained with]")
@click.option("--fps", type=float, help=f"Frames a second [{DEFAULT_FPS:g}].")
@click.option("--motion", type=float, help="Motion-free guidance, lambda_M; 1 is off.")
@click.option("--format", type=click.Choice(FORMATS),
              help="[by the suffix, else mp4]; png is a folder of pictures.")  # fmt: skip
@drawing_options
@click.option("--json", "as_json", is_flag=True, help="A JSON object on stdout.")
def video(
    prompt: str | None,
    output: Path | None,
    like: Path | None,
    frames: int | None,
    fps: float | None,
    motion: float | None,
    format: str | None,
    as_json: bool,
    choice: Choice,
    given: dict[str, Any],
) -> None:
    """Film PROMPT: H.264 in MP4 unless told otherwise."""
    from gentron.runtime.repeat import settings_of
    from gentron.runtime.video_file import check_fps, check_video_target, read_video_metadata

    given |= {n: v for n, v in (("frames", frames), ("motion", motion)) if v is not None}
    if (prompt is None) == (like is None):
        raise RequestError("prompt", "give exactly one of PROMPT, --like FILE")
    if like is not None:
        if given:
            raise RequestError("like", f"takes every setting from the file; drop {flags(given)}")
        metadata = read_video_metadata(like)
        settings, row = settings_of(metadata)
        rate = check_fps(float(metadata.get("fps", DEFAULT_FPS)) if fps is None else fps)
        check_video_target(output, 1, (settings.width, settings.height), format)
        with choice.as_recorded(metadata).load() as pipe:
            generation = pipe.generate(settings)
            draw(generation)
            _save(generation, output, rate, format, as_json, row=row, before=metadata)
        return
    rate = check_fps(DEFAULT_FPS if fps is None else fps)
    check_video_target(output, 1, (2, 2), format)  # again with the size, once it is known
    with choice.load() as pipe:
        given.setdefault("frames", pipe.bundle.config.sample_frames)
        generation = pipe.stream(str(prompt), **given)
        settings = generation.settings
        check_video_target(output, 1, (settings.width, settings.height), format)
        draw(generation)
        _save(generation, output, rate, format, as_json)


def _save(
    generation: Generation,
    output: Path | None,
    fps: float,
    format: str | None,
    as_json: bool,
    *,
    row: int = 0,
    before: dict[str, Any] | None = None,
) -> None:
    """Writes frames as they are decoded; Ctrl-C in the middle leaves nothing."""
    from gentron.runtime.image_file import default_name
    from gentron.runtime.repeat import differences_of
    from gentron.runtime.video_file import VideoFile, check_video_target

    settings, metadata = generation.settings, generation.metadata(row)
    for difference in differences_of(before, metadata) if before else ():
        warn(f"cannot promise the same bits: {difference}")
    chosen = check_video_target(output, 1, (settings.width, settings.height), format)
    name = default_name(settings.prompt, settings.seed + row)
    with VideoFile(metadata, output=output, name=name, fps=fps, format=chosen) as file:
        for frame in generation.frames():
            file.write(frame[row])
    if as_json:
        facts = {"file": str(file.path), "fps": fps, **metadata}
        say(json.dumps(facts | {"warnings": generation.warnings}, ensure_ascii=False))
    else:
        say(str(file.path))
