"""gentron-bench: how long the stages of a bundle take here, beside other ways to compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import gentron
from gentron.cli.common import Size, run_command, say, warn
from gentron.errors import OutputError


class Names(click.ParamType):  # type: ignore[type-arg]
    """`torch,torch-compile` -> a list."""

    name = "NAME,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ARG002
        return [part.strip() for part in str(value).split(",") if part.strip()]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle")
@click.option("--backend", "backends", type=Names(), default="", help="[the first usable]")
@click.option("--against", type=Names(), default="",
              help="torch, torch-compile, diffusers, diffusers-compile.")  # fmt: skip
@click.option("--stage", "stages", type=Names(), default="",
              help="encode, condition, step, decode [all; of a preset, step].")  # fmt: skip
@click.option("--precision", "precisions", type=Names(), default="",
              help="fp32, bf16, fp16 [the first backend's own].")  # fmt: skip
@click.option("--size", type=Size(), help="Pixels [the model's own].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True,
              help="Samples of a call.")  # fmt: skip
@click.option("--frames", type=click.IntRange(min=1), help="Of a video [the model's own].")
@click.option("--guidance", type=float, help="[the bundle's default]")
@click.option("--motion", type=float, help="[the bundle's default]")
@click.option("--depth", type=click.IntRange(min=1), help="Only so many blocks of a preset.")
@click.option("--threads", type=click.IntRange(min=1), help="[all physical cores]")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True,
              help="In which all take turns.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0), default=0.5, show_default=True,
              help="For each in a round.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Also write NAME.json and NAME.md.", metavar="NAME")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout, not Markdown.")
@click.version_option(gentron.__version__)
def cli(
    bundle: str,
    backends: list[str],
    against: list[str],
    stages: list[str],
    precisions: list[str],
    size: tuple[int, int] | None,
    batch: int,
    frames: int | None,
    guidance: float | None,
    motion: float | None,
    depth: int | None,
    threads: int | None,
    rounds: int,
    seconds: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE: a packaged name, a folder, or a preset with random weights.

    Each contender is a process of its own, and all take turns round by round, so ratios hold
    on a machine whose speed drifts. Peers get the same inputs, precision and threads.
    """
    from gentron.bench.run import run_benchmark

    report = run_benchmark(
        bundle,
        backends=backends,
        against=against,
        stages=stages,
        precisions=precisions,
        size=size,
        batch=batch,
        frames=frames,
        guidance=guidance,
        motion=motion,
        depth=depth or 0,
        threads=threads or 0,
        rounds=rounds,
        seconds=seconds,
        say=lambda line: click.echo(line, err=True),
    )
    text = json.dumps(report.to_dict(), indent=1)
    if output is not None:
        try:
            output.with_suffix(".json").write_text(text + "\n", "utf-8")
            output.with_suffix(".md").write_text(report.markdown(), "utf-8")
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror}") from error
    if report.weights == "random":
        warn("the weights are random: the figures are those of any weights")
    say(text if as_json else report.markdown().rstrip())


def main() -> None:
    run_command(cli)
