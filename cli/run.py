"""gentron-run: pictures from a bundle, and what a bundle and this machine can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.common import Bytes, Size, run_command, say, warn
from gentron.cli.progress import component_bars
from gentron.contract import PRECISIONS
from gentron.errors import RequestError

PRECISION_NAMES = {compute: name for name, compute in PRECISIONS.items()}

if TYPE_CHECKING:
    from gentron.engines.store import EngineStore
    from gentron.runtime.pipeline import Generation, Pipeline
    from gentron.runtime.result import Result


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gentron.__version__)
def cli() -> None:
    """Run a GenTron bundle: text to image, on compiled engines."""


@cli.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", "bundle", metavar="BUNDLE", help="Packaged name or folder [emoji].")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG file or folder.")
@click.option("--prompts", type=click.Path(path_type=Path), help="File with a prompt a line.")
@click.option("--like", type=click.Path(path_type=Path), help="Make this PNG again.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--solver", help="ddim, ddpm, dpm++2m, unipc, lcm or euler.")
@click.option("--guidance", type=float, help="How strictly to follow the prompt; 1 is off.")
@click.option("--negative", help="What to steer away from.")
@click.option("--seed", type=int, help="0 to 2**64-1; random if not given.")
@click.option("--batch", type=int, help="Images, with seeds SEED, SEED+1, ...")
@click.option("--size", type=Size(), help="Pixels, such as 128x128.")
@click.option("--backend", help="See gentron-run doctor.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="To compute in [the backend's own].")  # fmt: skip
@click.option("--engines", type=click.Path(path_type=Path), help="Folder of gentron-build -o.")
@click.option("--engines-sha256", metavar="HEX", help="What gentron-build printed for it.")
@click.option("--no-build", is_flag=True, help="Refuse where an engine is missing.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME=RANGE,...",
              help="Shapes to compile for, as for gentron-build.")  # fmt: skip
@click.option("--max-memory", "memory", type=Bytes(),
              help="Such as 20GB: load components in turn, free them for each other.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Of the processor [all cores].")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def image(
    prompt: str | None,
    bundle: str | None,
    output: Path | None,
    prompts: Path | None,
    like: Path | None,
    backend: str | None,
    precision: str | None,
    engines: Path | None,
    engines_sha256: str | None,
    no_build: bool,
    profiles: tuple[str, ...],
    memory: int | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw PROMPT."""
    from gentron.engines.options import engine_store
    from gentron.runtime.image_file import check_target, read_metadata
    from gentron.runtime.repeat import engines_of

    given = {name: value for name, value in options.items() if value is not None}
    store = partial(engine_store, engines, engines_sha256, build=not no_build)
    if sum(source is not None for source in (prompt, prompts, like)) != 1:
        raise RequestError("prompt", "give exactly one of PROMPT, --prompts FILE, --like FILE")
    if like is not None:
        if given:
            raise RequestError(
                "like", f"takes every setting from the file; drop --{', --'.join(given)}"
            )
        check_target(output, 1)
        metadata = read_metadata(like)
        before = engines_of(metadata).get("denoiser", {})
        with _load(
            str(metadata.get("bundle")) if bundle is None else bundle,
            before.get("backend") if backend is None else backend,
            precision or PRECISION_NAMES.get(before.get("precision", ""), "fp32"),
            profiles, store(), threads, memory,
        ) as pipe:  # fmt: skip
            _repeat(pipe, metadata, output, as_json)
        return
    wanted = [prompt] if prompt is not None else _read_prompts(prompts)
    check_target(output, len(wanted) * options["batch"] if options["batch"] else len(wanted))
    with _load(
        "emoji" if bundle is None else bundle, backend, precision, profiles, store(), threads,
        memory,
    ) as pipe:  # fmt: skip
        for one in wanted:
            assert one is not None
            generation = pipe.stream(one, **given)
            _draw(generation)
            result = generation.result()
            for row in range(len(result.images)):
                _save(result, row, output, as_json)


def _load(
    bundle: str,
    backend: str | None,
    precision: str | None,
    profiles: tuple[str, ...],
    store: EngineStore,
    threads: int | None,
    memory: int | None,
) -> Pipeline:
    """Behind progress bars where something has to be built; says which backend it chose."""
    from gentron.engines.options import EngineOptions
    from gentron.runtime import Pipeline

    with component_bars() as (progress, _):
        pipe = Pipeline.load(
            bundle,
            backend=backend,
            precision=precision,
            profiles=profiles,
            memory=memory,
            options=EngineOptions(store=store, threads=threads or 0, report=progress),
        )
    if backend is None:
        click.echo(f"backend {pipe.backend.describe()}", err=True)
    return pipe


@cli.command()
@click.argument("bundle", default="emoji")
@click.option("--verify", is_flag=True, help="Read every file, also those checked before.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def info(bundle: str, verify: bool, as_json: bool) -> None:
    """What BUNDLE holds: components, precisions, sizes, weights, licences.

    Checks the size and sha256 of every file. One that was checked before and whose dates are
    still the same is not read again.
    """
    from gentron.bundle import Bundle
    from gentron.runtime.describe import bundle_facts

    facts = bundle_facts(Bundle.open(bundle, verify="all" if verify else "remembered"))
    facts["checked"] = "every file, " + ("read anew" if verify else "read where it had changed")
    click.echo(json.dumps(facts, indent=1) if as_json else _lines(facts))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Versions, devices, and which backends could run here."""
    from gentron.runtime.describe import machine_facts

    facts = machine_facts()
    click.echo(json.dumps(facts, indent=1) if as_json else _lines(facts))


def _read_prompts(file: Path | None) -> list[str]:
    assert file is not None
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("prompts", f"{file}: cannot be read: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise RequestError("prompts", f"{file}: holds no prompt; write one a line")
    return found


def _repeat(pipe: Pipeline, metadata: dict[str, Any], output: Path | None, as_json: bool) -> None:
    from gentron.runtime.repeat import differences, settings_of

    settings, row = settings_of(metadata)
    generation = pipe.generate(settings)
    _draw(generation)
    result = generation.result()
    for difference in differences(metadata, result, row):
        warn(f"cannot promise the same bits: {difference}")
    _save(result, row, output, as_json)


def _draw(generation: Generation) -> None:
    """Runs a generation behind a progress bar with the time per step."""
    with _progress(generation.settings.prompt) as advance:
        for step in generation:
            advance(step.index + 1, step.total, step.seconds)
    for message in generation.result().warnings:
        warn(message)


@contextmanager
def _progress(prompt: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(prompt[:40]), total=None, pace="")

        def advance(done: int, total: int, seconds: float) -> None:
            bar.update(task, completed=done, total=total, pace=f"{seconds * 1000:.0f} ms/step")

        yield advance


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


def _lines(facts: dict[str, Any], indent: str = "") -> str:
    """Nested facts as aligned text."""
    width = max(len(name) for name in facts) if facts else 0
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {value}")
    return "\n".join(lines)


def main() -> None:
    run_command(cli)
