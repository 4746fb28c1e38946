"""gentron-plan: what a GPU that is not here would take, and which settings meet a budget."""

from __future__ import annotations

import json
import re
from typing import Any

import click

import gentron
from gentron.cli.common import Bytes, Size, run_command, say

COMPUTED = "computed from public figures, not measured; encoders and decoder come on top"


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
@click.option("--gpu", required=True, metavar="NAME", help="Such as L40S, RTX4090, A100, H100.")
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
    gpu: str,
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
    """Steps, batch and residency of BUNDLE that meet a latency and a memory limit on a GPU."""
    from gentron.bundle import Bundle
    from gentron.runtime.gpus import gpu_named
    from gentron.runtime.planning import Efficiency, plans_within

    opened, chosen = Bundle.open(bundle), gpu_named(gpu)
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
        efficiency=Efficiency(compute, bandwidth),
    )
    if as_json:
        rows = [vars(plan) | {"images_per_second": plan.images_per_second} for plan in plans]
        say(json.dumps({"gpu": vars(chosen), "how": COMPUTED, "plans": rows}, indent=1))
        return
    say(f"{chosen.name} ({chosen.generation}): {COMPUTED}")
    say("batch  steps  ms/step  ms in all  images/s  bound by   memory    engines")
    for plan in plans:
        say(
            f"{plan.batch:>5}  {plan.steps:>5}  {plan.step_seconds * 1e3:>7.2f}  "
            f"{plan.seconds * 1e3:>9.0f}  {plan.images_per_second:>8.2f}  {plan.bound:<9}  "
            f"{plan.memory_bytes / 1e9:>5.1f} GB  {'all resident' if plan.resident else 'in turn'}"
        )
    backend = "tensorrt-rtx" if chosen.rtx else "tensorrt"
    target = f" --gpu {chosen.generation}" if chosen.rtx else ""
    say(f"gentron-build {bundle} --backend {backend}{target} --profile {plans[0].profile}")


def main() -> None:
    run_command(cli)
