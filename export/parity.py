"""The gate every graph passes: equal to the torch module, within a written tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gentron.contract import Component
from gentron.errors import ParityError
from gentron.export.storage import TORCH_TYPES
from gentron.probe import ProbeCase, in_compute_type, probe_inputs
from gentron.weights import StoredTensor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    max_relative: float  # largest |difference| over largest |reference|
    cosine: float  # at least


# float32: order of summation only. float16 has 11 bits of mantissa, bfloat16 8; both are summed
# over a network's depth. A wrong graph is off by its whole range.
TOLERANCES = {
    "float32": Tolerance(2e-5, 0.999_999_9),
    "float16": Tolerance(2e-2, 0.999_9),
    "bfloat16": Tolerance(1.5e-1, 0.995),
}


@dataclass(frozen=True)
class Agreement:
    """How one output of one case compares with torch's float32."""

    component: str
    compute: str
    output: str
    sizes: dict[str, int]
    max_absolute: float
    max_relative: float
    cosine: float
    runner: str

    @property
    def passed(self) -> bool:
        allowed = TOLERANCES[self.compute]
        return self.max_relative <= allowed.max_relative and self.cosine >= allowed.cosine

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compare(
    component: Component,
    compute: str,
    case: ProbeCase,
    outputs: dict[str, Array],
    reference: dict[str, Array],
    runner: str,
) -> list[Agreement]:
    found = []
    for name, wanted in reference.items():
        got, ref = outputs[name].astype(np.float64), wanted.astype(np.float64)
        assert got.shape == ref.shape, (component.name, name, got.shape, ref.shape)
        difference, scale = np.abs(got - ref).max(), np.abs(ref).max()
        norms = np.linalg.norm(got) * np.linalg.norm(ref)
        found.append(
            Agreement(
                component.name,
                compute,
                name,
                case.sizes,
                float(difference),
                float(difference / scale) if scale else float(difference),
                float((got * ref).sum() / norms) if norms else float(difference == 0),
                runner,
            )
        )
    return found


def require(agreements: list[Agreement]) -> None:
    """Raises ParityError with the worst output; NaN never passes."""
    failed = [a for a in agreements if not a.passed]
    if failed:
        worst = max(failed, key=lambda a: a.max_relative if a.max_relative == a.max_relative else 9)
        raise ParityError(
            f"{worst.component} in {worst.compute}: output {worst.output} at {worst.sizes} differs "
            f"from torch: {worst.max_relative:.2g} of its range (allowed "
            f"{TOLERANCES[worst.compute].max_relative:g}), cosine {worst.cosine:.6f}; "
            "nothing was written"
        )


def reference_outputs(component: Component, module: nn.Module, case: ProbeCase) -> dict[str, Array]:
    """Torch's float32 outputs for a probe case."""
    inputs = probe_inputs(component, case)
    with torch.inference_mode():
        out = module(*(torch.from_numpy(inputs[spec.name]) for spec in component.inputs))
    values = out if isinstance(out, tuple) else (out,)
    return {
        spec.name: np.ascontiguousarray(value.numpy())
        for spec, value in zip(component.outputs, values, strict=True)
    }


def load_reference(module: nn.Module, tensors: Mapping[str, StoredTensor]) -> nn.Module:
    """Fills a float32 module with the bundle's stored weights, as every engine sees them."""
    state = {}
    for name, stored in tensors.items():
        raw = np.fromfile(stored.file, np.uint8, count=stored.length, offset=stored.offset)
        kind = TORCH_TYPES.get(stored.dtype, torch.int64)
        values = torch.from_numpy(raw).view(kind).reshape(stored.shape)
        state[name] = values.float() if values.is_floating_point() else values
    missing, extra = module.load_state_dict(state, strict=False)
    buffers = {name for name, _ in module.named_buffers()}
    assert not extra, extra
    assert not set(missing) - buffers, missing
    return module.eval()


def run_graph(
    component: Component, graph: Path, compute: str, cases: list[ProbeCase], side_factor: int
) -> tuple[list[dict[str, Array]], str]:
    """Runs the graph on every case; returns the outputs and what ran it."""
    feeds = [probe_inputs(component, case) for case in cases]
    if compute == "bfloat16":
        return _evaluate(component, graph, feeds), "onnx.reference"
    from gentron.engines import backend_named

    with backend_named("onnxruntime") as backend:
        precision = {"float32": "fp32", "float16": "fp16"}[compute]
        engine = backend.load(component, graph, precision, side_factor)
        try:
            outputs = [engine.run(in_compute_type(component, feed, compute)) for feed in feeds]
            return outputs, f"onnxruntime {engine.info.version}"
        finally:
            engine.close()


def _evaluate(
    component: Component, graph: Path, feeds: list[dict[str, Array]]
) -> list[dict[str, Array]]:
    """onnx's own evaluator: slow, but no CPU engine here computes in bfloat16."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(graph))
    names = [spec.name for spec in component.outputs]
    return [
        dict(
            zip(
                names,
                evaluator.run(names, in_compute_type(component, feed, "bfloat16")),
                strict=True,
            )
        )
        for feed in feeds
    ]
