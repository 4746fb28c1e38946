"""Public figures of GPUs, for plans made without one.

From the vendor's data sheets: dense float16 products with float32 sums, memory, its bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from gentron.errors import RequestError


@dataclass(frozen=True)
class Gpu:
    name: str
    generation: str  # as gentron-build --gpu takes it
    teraflops: float  # float16 tensor cores, dense, float32 accumulation
    bandwidth: float  # GB/s
    memory: float  # GB
    rtx: bool  # whether TensorRT-RTX runs on it


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", "sm75", 65, 320, 16, True),
        Gpu("A10", "sm86", 125, 600, 24, True),
        Gpu("A100", "sm80", 312, 2039, 80, True),
        Gpu("L4", "sm89", 121, 300, 24, True),
        Gpu("L40S", "sm89", 362, 864, 48, True),
        Gpu("RTX4090", "sm89", 165, 1008, 24, True),
        Gpu("RTX5090", "sm120", 210, 1792, 32, True),
        Gpu("H100", "sm90", 989, 3350, 80, False),
        Gpu("H200", "sm90", 989, 4800, 141, False),
        Gpu("B200", "sm100", 2250, 8000, 180, False),
    )
}


def gpu_named(name: str) -> Gpu:
    """By name, whatever its case, spaces and hyphens; raises RequestError that lists them."""
    wanted = name.upper().replace(" ", "").replace("-", "").removeprefix("NVIDIA")
    if wanted not in GPUS:
        raise RequestError("gpu", f"unknown GPU {name!r}; one of {', '.join(GPUS)}")
    return GPUS[wanted]
