"""gentron-export: a preset or checkpoint becomes a bundle of ONNX graphs and weights."""

from __future__ import annotations

import os
from pathlib import Path

import click

import gentron
from gentron.cli.common import run_command, warn
from gentron.errors import RequestError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="PRESET", help="A preset, with seeded random weights.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A folder of safetensors.")
@click.option("--fp16", is_flag=True, help="Store and compute in float16 [default].")
@click.option("--fp32", is_flag=True, help="Store and compute in float32 only.")
@click.option("--bf16", is_flag=True, help="Store and compute in bfloat16.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder [./NAME].")
@click.option("--shard-size", type=int, help="Largest weight file in bytes [5000000000].")
@click.option("--list", "list_presets", is_flag=True, help="List the presets and stop.")
@click.version_option(gentron.__version__)
def cli(
    model: str | None,
    checkpoint: Path | None,
    fp16: bool,
    fp32: bool,
    bf16: bool,
    output: Path | None,
    shard_size: int | None,
    list_presets: bool,
) -> None:
    """Trace every component to ONNX, link it to its weights, compare it with PyTorch.

    fp16 and bf16 bundles also hold float32 graphs over the same weights, for CPUs.
    """
    if list_presets:
        from gentron.presets import PRESETS

        for spec in PRESETS.values():
            click.echo(f"{spec.name:<18} {spec.note}")
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from gentron.export import export_bundle
        from gentron.export.bundle_writer import DEFAULT_SHARD
    except ImportError as error:
        raise RequestError(
            "export", f"cannot import {error.name}; run: pip install 'gentron[export]'"
        ) from error
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(component: str, doing: str) -> None:
            status.update(f"{component}: {doing}")
            if not console.is_terminal:
                click.echo(f"{component}: {doing}", err=True)

        bundle = export_bundle(
            model=model,
            checkpoint=checkpoint,
            fp16=fp16,
            fp32=fp32,
            bf16=bf16,
            output=output,
            shard_size=DEFAULT_SHARD if shard_size is None else shard_size,
            progress=progress,
        )
    if model is not None:
        warn("the weights are random: the bundle shows wiring and speed, not pictures")
    click.echo(str(bundle))


def main() -> None:
    run_command(cli)
