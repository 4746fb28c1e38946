"""Floating point operations of a stage: counted in its graphs, or from their shapes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from gentron.bench.work import EngineCall, Work
from gentron.bundle import Bundle
from gentron.engines.graphs import bundle_graph
from gentron.engines.openvino_engine import drop_lone_softmaxes, openvino_core
from gentron.runtime.cost import conditioner_cost, denoiser_cost, projection_cost

ITEM = 2  # bytes, which operations do not depend on


def stage_flops(work: Work) -> tuple[float | None, str]:
    """Operations of products and convolutions (a multiply and an add are two), and how they were
    counted. None where OpenVINO is not installed to read the graphs of encoders and decoders."""
    bundle = Bundle.open(work.bundle, verify="sizes")
    if importlib.util.find_spec("openvino") is None:
        counts = [_from_shapes(bundle, call) for call in work.calls]
        known = [count for count in counts if count is not None]
        return (sum(known) if len(known) == len(counts) else None), "from shapes"
    return sum(_in_graph(bundle, call) for call in work.calls), "in the graphs"


def _from_shapes(bundle: Bundle, call: EngineCall) -> float | None:
    sizes, config = call.case.sizes, bundle.config
    counters: dict[str, Callable[[], float]] = {
        "denoiser": lambda: denoiser_cost(config, sizes, ITEM).flops,
        "conditioner": lambda: conditioner_cost(config, sizes["T"], ITEM).flops,
        "text_projection": lambda: projection_cost(config, sizes["U"], ITEM).flops,
    }
    return counters[call.component]() if call.component in counters else None


def _in_graph(bundle: Bundle, call: EngineCall) -> float:
    component, sizes = bundle.components[call.component], call.case.sizes
    model = openvino_core().read_model(str(bundle_graph(bundle, call.component, "fp32").file))
    model.reshape({
        spec.name: [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        for spec in component.inputs
    })  # fmt: skip
    drop_lone_softmaxes(model)  # what leads to them alone need not be computed
    return sum(map(_operations, model.get_ordered_ops()))


def _operations(node: Any) -> float:
    kind = node.get_type_name()
    if kind == "MatMul":
        left = list(node.get_input_shape(0))
        inner = left[-2] if node.get_attributes()["transpose_a"] and len(left) > 1 else left[-1]
        return float(2 * math.prod(node.get_output_shape(0)) * inner)
    if kind in ("Convolution", "GroupConvolution"):
        kernel = list(node.get_input_shape(1))[1 if kind == "Convolution" else 2 :]
        return float(2 * math.prod(node.get_output_shape(0)) * math.prod(kernel))
    if kind in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
        kernel = list(node.get_input_shape(1))[1 if kind == "ConvolutionBackpropData" else 2 :]
        return float(2 * math.prod(node.get_input_shape(0)) * math.prod(kernel))
    return 0.0
