"""gentron-plan: what a GPU that is not here would take, and which settings meet a budget."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.common import Bytes, Size, run_command, say
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime.gpus import Gpu

COMPUTED = "computed from public figures, not measured; encoders and decoder come on top"
MEASURED = (
    "steps as measured ({}), those of other shapes scaled by their operations; {} come on top"
)


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """`800ms`, `1.5s` -> seconds."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(ms|s)", str(value).strip().lower())
        if not found or not float(found[1]):
            self.fail(f"{value!r} is not a time, such as 800ms or 1.5s", param, ctx)
        return float(found[1]) / (1000 if found[2] == "ms" else 1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle")
@click.option("--gpu", metavar="NAME", help="Such as L40S, RTX4090, A100, H100.")
@click.option("--measured", "files", multiple=True, type=click.Path(path_type=Path),
              metavar="FILE", help="A result of gentron-bench --json; repeatable.")  # fmt: skip
@click.option("--latency", type=Seconds(), required=True, help="Such as 800ms, of all steps.")
@click.option("--memory", type=Bytes(), help="Such as 12GB [the GPU's].")
@click.option("--size", type=Size(), help="Pixels [the model's own].")
@click.option("--frames", type=click.IntRange(min=1), default=1, show_default=True,
              help="Of a video.")  # fmt: skip
@click.option("--guidance", type=float, help="[the bundle's default]")
@click.option("--motion", type=float, help="[the bundle's default]")
@click.option("--compute", type=float, default=0.55, show_default=True,
              help="Share of the GPU's operations that kernels reach.")  # fmt: skip
@click.option("--bandwidth", type=float, default=0.75, show_default=True,
              help="Share of its memory bandwidth.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@click.version_option(gentron.__version__)
def cli(
    bundle: str,
    gpu: str | None,
    files: tuple[Path, ...],
    latency: float,
    memory: int | None,
    size: tuple[int, int] | None,
    frames: int,
    guidance: float | None,
    motion: float | None,
    compute: float,
    bandwidth: float,
    as_json: bool,
) -> None:
    """Steps, batch and residency of BUNDLE that meet a latency and a memory limit on a GPU.

    Times are computed from the GPU's public figures, or come from a benchmark with --measured;
    without --gpu they are those of the machine that was measured.
    """
    from gentron.bundle import Bundle
    from gentron.runtime.gpus import gpu_named
    from gentron.runtime.measured import read_measured
    from gentron.runtime.planning import Efficiency, measured_machine, plans_within

    opened = Bundle.open(bundle)
    measured = read_measured(files, opened) if files else None
    if gpu is not None:
        chosen = gpu_named(gpu)
        if measured is not None:
            measured.check_device(chosen.name)
    elif measured is not None:
        chosen = measured_machine(measured, opened)
    else:
        raise RequestError("gpu", "name one with --gpu, or give a result with --measured FILE")
    defaults = opened.manifest.defaults
    plans = plans_within(
        opened,
        chosen,
        latency,
        size=size or opened.native_size,
        frames=frames,
        guidance=defaults.guidance if guidance is None else guidance,
        motion=defaults.motion if motion is None else motion,
        memory=memory,
        efficiency=Efficiency(compute, bandwidth) if chosen.generation else Efficiency(1.0, 1.0),
        measured=measured,
    )
    how = MEASURED.format(measured.backend, measured.on_top()) if measured else COMPUTED
    if as_json:
        rows = [vars(plan) | {"images_per_second": plan.images_per_second} for plan in plans]
        say(json.dumps({"gpu": _facts(chosen), "how": how, "plans": rows}, indent=1))
        return
    place = f"{chosen.name} ({chosen.generation})" if chosen.generation else chosen.name
    say(f"{place}: {how}")
    say("batch  steps  ms/step  ms in all  images/s  bound by   memory    engines       the step")
    for plan in plans:
        engines = "all resident" if plan.resident else "in turn"
        say(
            f"{plan.batch:>5}  {plan.steps:>5}  {plan.step_seconds * 1e3:>7.2f}  "
            f"{plan.seconds * 1e3:>9.0f}  {plan.images_per_second:>8.2f}  {plan.bound:<9}  "
            f"{plan.memory_bytes / 1e9:>5.1f} GB  {engines:<12}  {plan.how}"
        )
    if not chosen.generation:
        return
    backend = "tensorrt-rtx" if chosen.rtx else "tensorrt"
    target = f" --gpu {chosen.generation}" if chosen.rtx else ""
    say(f"gentron-build {bundle} --backend {backend}{target} --profile {plans[0].profile}")


def _facts(gpu: Gpu) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    return {key: None if value == math.inf else value for key, value in vars(gpu).items()}


def main() -> None:
    run_command(cli)
