"""The range audit: how far the numbers of a 16-bit graph go when nothing cuts them off.

ONNX Runtime's CPU computes float16 wider than float16, so it cannot see an overflow that a GPU
would have. The float16 graph is widened, its casts kept in place as float32, and every tensor that
float16 would hold reports its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from gentron.errors import ParityError

Array = npt.NDArray[Any]
FLOAT16_MAX = 65504.0
RANGE_LIMIT = FLOAT16_MAX / 4  # real prompts and trained outliers go further than any probe
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
MAXIMUM = ".largest"  # suffix of the outputs that report a tensor's largest magnitude


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of one 16-bit tensor over all audited inputs."""

    tensor: str
    operator: str  # that made it
    largest: float


@dataclass(frozen=True)
class RangeAudit:
    tensors: int
    limit: float
    highest: tuple[Peak, ...]  # the twenty largest, largest first

    @property
    def passed(self) -> bool:
        return not self.highest or self.highest[0].largest <= self.limit  # NaN never passes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    def require(self, component: str) -> None:
        """Raises ParityError that names the tensor which leaves a quarter of float16's range."""
        if not self.passed:
            peak = self.highest[0]
            raise ParityError(
                f"{component}: {peak.tensor} ({peak.operator}) reaches {peak.largest:.3g} in "
                f"float32; float16 ends at {FLOAT16_MAX:.0f}, and {self.limit:.0f} is the most "
                "allowed; export with --bf16 or --fp32"
            )


def widened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy that computes in float32 what `model` computes in 16 bits, from the same stored
    weights; and the tensors that were 16 bits wide, with the operator that makes each."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    narrow = {
        value.name: "input"
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.elem_type in NARROW
    }
    made = {name: node.op_type for node in graph.node for name in node.output}
    casts = [_widen_initializer(t) for t in graph.initializer if t.data_type in NARROW]
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in NARROW:
                _widen_tensor(attribute.t)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*(cast for cast in casts if cast is not None), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    weights = {t.name for t in model.graph.initializer}
    return wide, {
        name: made[name] for name in narrow if name in made and name not in weights
    }  # fmt: skip


def _widen_initializer(tensor: TensorProto) -> onnx.NodeProto | None:
    """Values inside the graph are converted; stored ones pass a Cast under their old name."""
    if tensor.data_location != TensorProto.EXTERNAL:
        _widen_tensor(tensor)
        return None
    name = tensor.name
    tensor.name = f"{name}.stored"
    return onnx.helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT)


def _widen_tensor(tensor: TensorProto) -> None:
    values = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def with_maxima(model: onnx.ModelProto, tensors: Mapping[str, str]) -> onnx.ModelProto:
    """Adds an output NAME.largest = max |NAME| for each of the tensors, right where it is made."""
    graph, nodes = model.graph, []
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            if name in tensors:
                nodes += [
                    onnx.helper.make_node("Abs", [name], [f"{name}.magnitude"]),
                    onnx.helper.make_node(
                        "ReduceMax", [f"{name}.magnitude"], [name + MAXIMUM], keepdims=0
                    ),
                ]
                graph.output.append(
                    onnx.helper.make_tensor_value_info(name + MAXIMUM, TensorProto.FLOAT, [])
                )
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return model


def audit(tensors: Mapping[str, str], runs: Sequence[Mapping[str, Array]]) -> RangeAudit:
    """From the outputs of `with_maxima` over all inputs."""
    peaks = [
        Peak(name, operator, float(np.max([run[name + MAXIMUM] for run in runs])))
        for name, operator in tensors.items()
        if name + MAXIMUM in runs[0]
    ]
    peaks.sort(key=lambda peak: peak.largest if peak.largest == peak.largest else np.inf)
    return RangeAudit(len(peaks), RANGE_LIMIT, tuple(reversed(peaks[-20:])))
