"""gentron-run image."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gentron.cli.common import say, warn
from gentron.cli.drawing import Choice, draw, drawing_options, flags, read_prompts
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime.pipeline import Pipeline
    from gentron.runtime.result import Result


@click.command()
@click.argument("prompt", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG file or folder.")
@click.option("--prompts", type=click.Path(path_type=Path), help="File with a prompt a line.")
@click.option("--like", type=click.Path(path_type=Path), help="Make this PNG again.")
@click.option("--batch", type=int, help="Images, with seeds SEED, SEED+1, ...")
@drawing_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def image(
    prompt: str | None,
    output: Path | None,
    prompts: Path | None,
    like: Path | None,
    as_json: bool,
    choice: Choice,
    given: dict[str, Any],
) -> None:
    """Draw PROMPT."""
    from gentron.runtime.image_file import check_target, read_metadata

    if sum(source is not None for source in (prompt, prompts, like)) != 1:
        raise RequestError("prompt", "give exactly one of PROMPT, --prompts FILE, --like FILE")
    if like is not None:
        if given:
            raise RequestError("like", f"takes every setting from the file; drop {flags(given)}")
        check_target(output, 1)
        metadata = read_metadata(like)
        with choice.as_recorded(metadata).load() as pipe:
            _repeat(pipe, metadata, output, as_json)
        return
    wanted = read_prompts(prompts) if prompts is not None else [str(prompt)]
    check_target(output, len(wanted) * given.get("batch", 1))
    if choice.devices and len(choice.devices) > 1:
        _share(wanted, given, choice, output, as_json)
        return
    with choice.load() as pipe:
        for one in wanted:
            generation = pipe.stream(one, **given)
            draw(generation)
            result = generation.result()
            for row in range(len(result.images)):
                _save(result, row, output, as_json)


def _share(
    wanted: list[str], given: dict[str, Any], choice: Choice, output: Path | None, as_json: bool
) -> None:
    """Prompts over several devices; files are written and named in the order of the prompts."""
    from gentron.runtime.devices import stopped

    with choice.load_all() as devices:

        def one(prompt: str, pipe: Pipeline) -> Result:
            generation = pipe.stream(prompt, **given)
            for _ in generation:
                if devices.stopping.is_set():
                    raise stopped()
            return generation.result()

        drawn = [devices.submit(partial(one, prompt)) for prompt in wanted]
        for future in drawn:
            result = future.result()
            for message in result.warnings:
                warn(message)
            for row in range(len(result.images)):
                _save(result, row, output, as_json)


def _repeat(pipe: Pipeline, metadata: dict[str, Any], output: Path | None, as_json: bool) -> None:
    from gentron.runtime.repeat import differences, settings_of

    settings, row = settings_of(metadata)
    generation = pipe.generate(settings)
    draw(generation)
    result = generation.result()
    for difference in differences(metadata, result, row):
        warn(f"cannot promise the same bits: {difference}")
    _save(result, row, output, as_json)


def _save(result: Result, row: int, output: Path | None, as_json: bool) -> None:
    from gentron.runtime.image_file import default_name, save_png

    metadata = result.metadata(row)
    name = default_name(result.settings.prompt, result.seeds[row])
    file = save_png(result.images[row], metadata, output=output, name=name)
    if not as_json:
        say(str(file))
        return
    stages = {s.stage: {k: v for k, v in vars(s).items() if k != "stage"} for s in result.stages}
    say(
        json.dumps({"file": str(file), **metadata, "stages": stages,
                    "warnings": list(result.warnings)}, ensure_ascii=False)
    )  # fmt: skip
