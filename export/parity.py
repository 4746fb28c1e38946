"""The gate every graph passes: equal to the torch module, within a written tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gentron.contract import Component
from gentron.export.storage import TORCH_TYPES
from gentron.probe import ProbeCase, in_compute_type, probe_inputs
from gentron.weights import StoredTensor

Array = npt.NDArray[Any]


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
