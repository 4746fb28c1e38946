"""What an export will take, said before it begins: disk, and time on this machine."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gentron.config import GenTronConfig
from gentron.errors import ResourceError
from gentron.export.components import Part
from gentron.export.storage import TensorSource
from gentron.probe import probe_sizes

GRAPH_BYTES = 8_000_000  # more than the largest graph of any preset
# Measured on two cores of about 3 GHz: importing torch, tracing a block, moving weights.
IMPORT_SECONDS = 10.0
TRACE_SECONDS_PER_LINEAR = 0.3
RANDOM_BYTES_PER_SECOND = 120e6
COPY_BYTES_PER_SECOND = 400e6
LOAD_BYTES_PER_SECOND = 400e6  # float32: reading, widening, handing to an engine
DECODER_WORK = 6.0  # convolutions run on up to 64 times the latents' area, with fewer channels


@dataclass(frozen=True)
class ExportPlan:
    """What will be written, and roughly how long it takes here."""

    components: tuple[str, ...]
    parameters: int
    disk_bytes: int  # still to write
    seconds: float  # rough: within a factor of two on an idle machine
    target: Path

    @property
    def text(self) -> str:
        free = shutil.disk_usage(self.target.parent).free
        return (
            f"{len(self.components)} components, {self.parameters / 1e9:.3g} billion parameters; "
            f"to write: {self.disk_bytes / 1e9:.2f} GB ({free / 1e9:.0f} GB are free); "
            f"about {max(1, round(self.seconds / 60))} min on this machine"
        )

    def require_disk(self) -> None:
        """Raises ResourceError with both numbers if the disk is too small."""
        free = shutil.disk_usage(self.target.parent).free
        if free < self.disk_bytes:
            raise ResourceError(
                f"{self.target.parent}: {self.disk_bytes / 1e9:.2f} GB are needed, "
                f"{free / 1e9:.2f} GB are free; free some space, or choose another -o"
            )


def make_plan(
    parts: Sequence[Part],
    config: GenTronConfig,
    weights: Sequence[TensorSource],
    precisions: Sequence[str],
    target: Path,
    *,
    written: int,
    random: bool,
) -> ExportPlan:
    """`written` bytes of the weights are on disk from before; `random` ones are drawn first."""
    stored = sum(tensor.length for tensor in weights)
    rate = RANDOM_BYTES_PER_SECOND if random else COPY_BYTES_PER_SECOND
    seconds = IMPORT_SECONDS + (stored - written) / rate
    disk = stored - written + len(parts) * len(precisions) * GRAPH_BYTES
    flops = _flops_per_second()
    runs = 2 + len(precisions)  # torch, every graph, the range audit
    for part in parts:
        with torch.device("meta"):
            module = part.build()
        parameters = sum(p.numel() for p in module.parameters())
        layers = sum(isinstance(m, torch.nn.Linear) for m in module.modules())
        cases = _sizes(part, config)
        disk += sum(_output_bytes(part, case) for case in cases)
        work = sum(2 * parameters * _tokens(part, config, case) for case in cases)
        seconds += len(precisions) * layers * TRACE_SECONDS_PER_LINEAR
        seconds += runs * (4 * parameters / LOAD_BYTES_PER_SECOND + work / flops)
    names = tuple(part.component.name for part in parts)
    count = sum(math.prod(tensor.shape) for tensor in weights)
    return ExportPlan(names, count, max(0, disk), seconds, target)


def _sizes(part: Part, config: GenTronConfig) -> list[dict[str, int]]:
    if part.component.name.startswith("text_encoder"):
        return [{"U": 3}, {"U": 1}]
    return probe_sizes(part.component, config)


def _output_bytes(part: Part, case: dict[str, int]) -> int:
    return sum(
        4 * math.prod(case.get(a, 1024) if isinstance(a, str) else a for a in spec.axes)
        for spec in part.component.outputs
    )


def _tokens(part: Part, config: GenTronConfig, case: dict[str, int]) -> float:
    """How often each weight is used in one run of a probe case."""
    name = part.component.name
    if name == "conditioner":
        return case["T"]
    if name == "denoiser":
        return case["R"] * case["F"] * case["h"] * case["w"] / config.patch**2
    if name == "vae_decoder":
        return case["K"] * case["h"] * case["w"] * DECODER_WORK
    longest = max(text.max_tokens for text in config.text)
    return case["U"] * longest


def _flops_per_second() -> float:
    """Of a float32 matrix product here and now."""
    side = 1024
    left, right = torch.randn(2, side, side).unbind(0)
    torch.mm(left, right)
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(left, right)
    return 3 * 2 * side**3 / (time.perf_counter() - started)
