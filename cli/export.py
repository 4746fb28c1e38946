"""gentron-export: a preset or checkpoint becomes a bundle of ONNX graphs and weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import gentron
from gentron.cli.build import BACKENDS, build, line_of
from gentron.cli.common import run_command, warn
from gentron.cli.progress import component_bars
from gentron.contract import PRECISIONS
from gentron.errors import RequestError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="PRESET", help="A preset, with seeded random weights.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A folder of safetensors: ours or PixArt's.",
)
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
              help="Merge this LoRA into PixArt's transformer; repeatable.")  # fmt: skip
@click.option("--video", is_flag=True, help="Add untrained temporal layers: shape and speed.")
@click.option("--fp16", is_flag=True, help="Store and compute in float16 [default].")
@click.option("--fp32", is_flag=True, help="Store and compute in float32 only.")
@click.option("--bf16", is_flag=True, help="Store and compute in bfloat16.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder [./NAME].")
@click.option("--only", multiple=True, metavar="COMPONENT",
              help="Export this component; repeatable [all].")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with an export that was interrupted.")
@click.option("--shard-size", type=int, help="Largest weight file in bytes [5000000000].")
@click.option("--build", "backend", type=click.Choice(BACKENDS), help="Then also gentron-build.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME=RANGE,...",
              help="Shapes for --build; repeatable.")  # fmt: skip
@click.option("--triton", type=click.Path(path_type=Path), metavar="DIR",
              help="Put the bundle into a Triton Inference Server model repository.")  # fmt: skip
@click.option("--bundle", "ready", metavar="BUNDLE",
              help="Nothing is exported: this one goes into the --triton repository.")  # fmt: skip
@click.option("--list", "list_presets", is_flag=True, help="List the presets and stop.")
@click.version_option(gentron.__version__)
def cli(
    model: str | None,
    checkpoint: Path | None,
    loras: tuple[str, ...],
    video: bool,
    output: Path | None,
    only: tuple[str, ...],
    resume: bool,
    shard_size: int | None,
    backend: str | None,
    profiles: tuple[str, ...],
    triton: Path | None,
    ready: str | None,
    list_presets: bool,
    **precisions: bool,
) -> None:
    """Trace every component to ONNX, link it to its weights, compare it with PyTorch.

    fp16 and bf16 bundles also hold float32 graphs over the same weights, for CPUs.
    """
    if list_presets:
        from gentron.presets import PRESETS

        for spec in PRESETS.values():
            click.echo(f"{spec.name:<18} {spec.note}")
        return
    if profiles and backend is None:
        raise RequestError("profile", "is for engines: add --build BACKEND")
    if ready is not None:
        if triton is None or model is not None or checkpoint is not None:
            raise RequestError("bundle", "goes with --triton DIR and without a source to export")
        click.echo(str(_triton_repository(triton, ready)))
        return
    if triton is not None:
        output = _triton_output(triton, output, only, resume)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        from gentron.export import export_bundle
        from gentron.export.bundle_writer import DEFAULT_SHARD
    except ImportError as error:
        raise RequestError(
            "export", f"cannot import {error.name}; run: pip install 'gentron[export]'"
        ) from error
    with component_bars() as (progress, say):
        if model is not None:
            warn("the weights are random: the bundle shows wiring and speed, not pictures")
        bundle = export_bundle(
            model=model,
            checkpoint=checkpoint,
            loras=loras,
            video=video,
            output=output,
            only=only,
            resume=resume,
            shard_size=DEFAULT_SHARD if shard_size is None else shard_size,
            found=say,
            planned=lambda plan: say(plan.text),
            progress=progress,
            **precisions,
        )
    for line in _summary(bundle):
        click.echo(line, err=True)
    if backend is not None:
        for built in build(bundle, backend, profiles=profiles, components=only):
            click.echo(line_of(built), err=True)
    click.echo(str(bundle if triton is None else _triton_repository(triton)))


def _triton_repository(target: Path, bundle: str | None = None) -> Path:
    from gentron.runtime.triton_repository import write_repository

    return write_repository(target, bundle)


def _triton_output(target: Path, output: Path | None, only: tuple[str, ...], resume: bool) -> Path:
    """Where the bundle is exported to, so that it need not be copied."""
    from gentron.runtime.triton_repository import bundle_folder, check_free

    if output is not None or only:
        raise RequestError("triton", "holds a whole bundle; leave --output and --only out")
    if not resume:
        check_free(target)
    return bundle_folder(target)


def _summary(bundle: Path) -> Iterator[str]:
    """What was exported, how long it took and how much memory, from the bundle's own report."""
    from gentron.bundle import REPORT

    report = json.loads((bundle / REPORT).read_text("utf-8"))
    header = ("component", "parameters", "trace s", "check s", "trace GB", "check GB", "worst")
    yield _row(header)
    for found in report["components"]:
        yield _row(_facts(found))
    yield f"memory is each process's peak; worst is of the range; details: {bundle / REPORT}"


def _facts(found: dict[str, Any]) -> tuple[str, ...]:
    first = found["precisions"][0]
    compute = PRECISIONS[first]
    worst = max(a["max_relative"] for a in found["parity"] if a["compute"] == compute)
    seconds, peak = found["seconds"], found["peak_bytes"]
    return (
        found["component"],
        f"{found['graphs'][0]['parameters'] / 1e6:,.1f} M",
        f"{seconds['trace']:.0f}",
        f"{seconds['parity']:.0f}",
        f"{peak['trace'] / 1e9:.2f}",
        f"{peak['parity'] / 1e9:.2f}",
        f"{worst:.1g} in {first}",
    )


def _row(cells: tuple[str, ...]) -> str:
    widths = (-18, 12, 8, 8, 9, 9, 16)
    return "".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for cell, width in zip(cells, widths, strict=True)
    )


def main() -> None:
    run_command(cli)
