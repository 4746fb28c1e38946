"""What an exported graph is like: operators, weights in 16 bits, islands in 32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from gentron.export.ranges import NARROW

BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}
# They move numbers and do not compute with them.
PASSIVE = frozenset({"Cast", "Constant", "Concat", "Expand", "Flatten", "Gather", "Identity"})
PASSIVE |= {"Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def graph_facts(graph: Path) -> dict[str, Any]:
    """Counts and names for the report: file size, operators, the share of weight bytes that is
    stored in 16 bits, and the float32 islands of a 16-bit graph (operators that compute in
    float32, with the tensors they make)."""
    model = onnx.load(graph, load_external_data=False)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    }
    stored = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    sizes = {t.name: _count(t) * BYTES.get(t.data_type, 8) for t in stored}
    narrow = sum(sizes[t.name] for t in stored if t.data_type in NARROW)
    facts: dict[str, Any] = {
        "file": graph.name,
        "bytes": graph.stat().st_size,
        "nodes": len(model.graph.node),
        "operators": dict(Counter(n.op_type for n in model.graph.node).most_common()),
        "parameters": sum(_count(t) for t in stored),
        "weight_bytes": sum(sizes.values()),
        "share_of_weights_in_16_bits": round(narrow / max(1, sum(sizes.values())), 6),
    }
    if any(types.get(name) in NARROW for node in model.graph.node for name in node.output):
        facts["float32_islands"] = {
            "operators": dict(_islands(model, types, names=False)),
            "tensors": [name for name, _ in _islands(model, types, names=True).items()],
        }
    return facts


def _islands(model: onnx.ModelProto, types: dict[str, int], *, names: bool) -> Counter[str]:
    return Counter(
        name if names else node.op_type
        for node in model.graph.node
        for name in node.output
        if node.op_type not in PASSIVE and types.get(name) == TensorProto.FLOAT
    )


def _count(tensor: TensorProto) -> int:
    count = 1
    for side in tensor.dims:
        count *= side
    return count
