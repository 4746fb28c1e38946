"""Points a graph's initializers at the bytes of the bundle's own safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gentron.weights import StoredTensor

STORED_TYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class WeightMap:
    """Stored tensors by the traced module's parameter names; paths relative to the graph."""

    tensors: Mapping[str, StoredTensor]
    folder: Path


def link_weights(model: ir.Model, weights: WeightMap, *, prefix: str) -> None:
    """Every parameter becomes external data. A weight stored in another type than the graph
    computes in passes a Cast, which engines fold when they load it.

    Parameters of a module traced under fake tensors have no values, so none may stay behind.
    """
    graph = model.graph
    casts: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if name.startswith(prefix):
            stored_name = name.removeprefix(prefix)
            assert stored_name in weights.tensors, f"{stored_name} is not stored"
            stored = weights.tensors[stored_name]
            assert value.shape is not None, stored_name
            assert value.shape.numpy() == stored.shape, stored_name
            wanted = value.dtype
            assert wanted is not None
            stored_type = STORED_TYPES[stored.dtype]
            external = ir.ExternalTensor(
                location=stored.file.relative_to(weights.folder).as_posix(),
                offset=stored.offset,
                length=stored.length,
                dtype=stored_type,
                shape=ir.Shape(stored.shape),
                name=stored_name,
                base_dir=weights.folder,
            )
            del graph.initializers[name]
            weight = ir.Value(
                name=stored_name,
                shape=ir.Shape(stored.shape),
                type=ir.TensorType(stored_type),
                const_value=external,
            )
            graph.register_initializer(weight)
            replacement = weight
            if stored_type != wanted:
                cast = ir.node("Cast", [weight], {"to": wanted.value}, name=f"{stored_name}.cast")
                cast.outputs[0].name = f"{stored_name}.as_{wanted.name.lower()}"
                cast.outputs[0].type = ir.TensorType(wanted)
                cast.outputs[0].shape = ir.Shape(stored.shape)
                casts[stored_name] = cast.outputs[0]
                replacement = cast.outputs[0]
            ir.convenience.replace_all_uses_with(value, replacement)
    first = next(iter(graph), None)
    if first is not None and casts:
        graph.insert_before(first, [value.producer() for value in casts.values()])
