"""Which steps, batch and residency meet a latency and a memory limit, computed from a roofline.

A step takes at least the time of its operations at the GPU's peak and that of its bytes at the
GPU's bandwidth. Real kernels reach a share of either; `Efficiency` says which share is assumed.
That is where to start; a benchmark's result (`runtime/measured.py`) replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gentron.bundle import Bundle
from gentron.config import GenTronConfig
from gentron.errors import RequestError
from gentron.guidance import guidance_branches
from gentron.latents import latent_size
from gentron.runtime.cost import Cost, conditioner_cost, denoiser_cost, projection_cost
from gentron.runtime.gpus import Gpu
from gentron.runtime.measured import Measured
from gentron.runtime.residency import component_bytes

ITEMS = {"fp16": 2, "bf16": 2, "fp32": 4}  # bytes of a value
STEPS = (4, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50)
BATCHES = (1, 2, 4, 8, 16)
HOST_SECONDS = 100e-6  # a step, beside the GPU's work
LAUNCH_SECONDS = 20e-6  # of a captured step


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's public figures that kernels are assumed to reach."""

    compute: float = 0.55
    bandwidth: float = 0.75

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                raise RequestError("efficiency", f"{name} must be above 0 and at most 1")


@dataclass(frozen=True)
class Plan:
    """One way to serve a request. `how` its step's time is known: "computed", "measured", or
    "scaled" from a measured step of another shape."""

    gpu: str
    steps: int
    batch: int
    rows: int  # of every step
    step_seconds: float
    condition_seconds: float
    seconds: float  # of all steps and the conditioning; encoders and decoder come on top
    bound: str  # what limits a step: "compute" or "bandwidth"
    resident: bool  # all engines at once, or in turn
    memory_bytes: int  # at the peak
    profile: str  # for gentron-build
    how: str = "computed"

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds


def roofline_seconds(cost: Cost, gpu: Gpu, efficiency: Efficiency) -> tuple[float, str]:
    """The least time of one call, and what bounds it."""
    compute = cost.flops / (gpu.teraflops * 1e12 * efficiency.compute)
    memory = cost.bytes / (gpu.bandwidth * 1e9 * efficiency.bandwidth)
    return max(compute, memory), "compute" if compute >= memory else "bandwidth"


def make_plan(
    bundle: Bundle,
    gpu: Gpu,
    *,
    steps: int,
    batch: int,
    size: tuple[int, int],
    frames: int = 1,
    guidance: float = 4.0,
    motion: float = 1.0,
    memory: int | None = None,
    efficiency: Efficiency | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Computes one plan; `size` is (width, height), `memory` in bytes the GPU's own by default.

    Steps that were measured on this GPU take the place of computed ones. Raises RequestError for
    sizes the model does not take, and if nothing fits the memory.
    """
    efficiency, config = efficiency or Efficiency(), bundle.config
    height, width = latent_size(config, bundle.vae_factor, *size)
    branches = guidance_branches(guidance, motion, moving=config.temporal and frames > 1)
    rows, texts = batch * len(branches), len({branch.text for branch in branches})
    precision = measured.steps[0].precision if measured else "fp16"
    item = ITEMS[precision]
    sizes = {"B": batch, "R": rows, "F": frames, "h": height, "w": width}
    step, bound = roofline_seconds(denoiser_cost(config, sizes, item), gpu, efficiency)
    table = steps * (texts if config.pooled_width else 1)
    before = conditioner_cost(config, table, item), projection_cost(config, texts, item)
    condition = sum(roofline_seconds(cost, gpu, efficiency)[0] for cost in before)
    how = "computed"
    if measured is None:
        step += LAUNCH_SECONDS + (HOST_SECONDS if step < HOST_SECONDS else 0)
    else:
        nearest = measured.nearest(sizes)
        how = "scaled" if nearest.distance(sizes) else "measured"
        least, _ = roofline_seconds(denoiser_cost(config, nearest.sizes, item), gpu, efficiency)
        beyond = nearest.seconds / least
        step, condition = step * beyond, condition * beyond

    sizes_of = {name: component_bytes(bundle, name, precision) for name in bundle.components}
    working = _working_bytes(config, sizes, table, texts, item)
    allowed = int(gpu.memory * 1e9) if memory is None else memory
    together, in_turn = sum(sizes_of.values()) + working, max(sizes_of.values()) + working
    if in_turn > allowed:
        largest = max(sizes_of, key=sizes_of.__getitem__)
        raise RequestError(
            "memory",
            f"{largest} and the tables need {in_turn / 1e9:.1f} GB, {allowed / 1e9:.1f} GB are "
            "there; use a smaller batch or size, or a GPU with more memory",
        )
    return Plan(
        gpu=gpu.name,
        steps=steps,
        batch=batch,
        rows=rows,
        step_seconds=step,
        condition_seconds=condition,
        seconds=steps * step + condition,
        bound=bound,
        resident=together <= allowed,
        memory_bytes=together if together <= allowed else in_turn,
        profile=f"samples={batch},rows={rows},size={size[0]}x{size[1]},frames={frames},"
        f"table=1:{table}:{max(table, 512)},texts=1:{texts}:{2 * max(texts, batch)}",
        how=how,
    )


def measured_machine(measured: Measured, bundle: Bundle) -> Gpu:
    """What was measured as a machine to plan for: as fast as its first step, and no faster for any
    other reason than fewer operations."""
    step = measured.steps[0]
    flops = denoiser_cost(bundle.config, step.sizes, ITEMS[step.precision]).flops
    return Gpu(
        name=f"{measured.device}, {measured.backend}",
        generation="",
        teraflops=flops / step.seconds / 1e12,
        bandwidth=math.inf,
        memory=measured.memory / 1e9,
        rtx=False,
    )


def plans_within(
    bundle: Bundle,
    gpu: Gpu,
    latency: float,
    *,
    steps: Sequence[int] = STEPS,
    batches: Sequence[int] = BATCHES,
    **request: object,
) -> list[Plan]:
    """For every batch the most steps whose computed time is within `latency` seconds.

    Raises RequestError that says what the fastest would take, if none is.
    """
    found: list[Plan] = []
    fastest: Plan | None = None
    for batch in batches:
        best: Plan | None = None
        for count in sorted(steps):
            try:
                plan = make_plan(bundle, gpu, steps=count, batch=batch, **request)  # type: ignore[arg-type]
            except RequestError as error:
                if batch == batches[0] or error.field != "memory":
                    raise
                break
            fastest = fastest or plan
            if plan.seconds <= latency:
                best = plan
        if best is None:
            break
        found.append(best)
    if not found:
        assert fastest is not None
        raise RequestError(
            "latency",
            f"{fastest.steps} steps alone take about {fastest.seconds * 1e3:.0f} ms on a "
            f"{gpu.name}; allow more time, a smaller size, or guidance 1 (a row less a sample)",
        )
    return found


def _working_bytes(
    config: GenTronConfig, sizes: dict[str, int], table: int, texts: int, item: int
) -> int:
    """Conditioning tables, two states and the activations of one block."""
    tokens = sizes["R"] * sizes["F"] * sizes["h"] * sizes["w"] // config.patch**2
    latents = sizes["B"] * sizes["F"] * config.latent_channels * sizes["h"] * sizes["w"]
    activations = tokens * (config.mlp_width + 8 * config.width) * item
    tables = conditioner_cost(config, table, item).table_bytes
    tables += projection_cost(config, texts, item).table_bytes
    return int(activations + tables + latents * 4 * 7)
