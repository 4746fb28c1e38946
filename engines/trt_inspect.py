"""Which kernels a built engine consists of, from TensorRT's engine inspector.

It needs an engine that is loaded, and so a GPU. `inspect_engine` has never run on one here;
`read_inspection` is tested on JSON of the documented form.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from gentron.engines.compiler import Facts
from gentron.errors import BackendError

ATTENTION = re.compile(r"mha|attention|flash", re.IGNORECASE)  # _gemm_mha_v2, fmha, ...
LISTED = 20  # kernels of fused attention by name


def inspect_engine(trt: Any, engine: Any, component: str) -> Facts:
    """Facts of an engine that is loaded; those about types need DETAILED verbosity at build."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return read_inspection(text, component)


def read_inspection(text: str, component: str) -> Facts:
    """Layers by type and by the type of their first output, and kernels of fused attention.

    `text` is the inspector's JSON: {"Layers": [...], ...}, where a layer is an object, or only a
    name when the engine was built without DETAILED verbosity. Before version 11 a tensor has
    "Format/Datatype", from then on "Format" and "Datatype". Raises BackendError for anything else.
    """
    try:
        layers = [_layer(value) for value in json.loads(text)["Layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(
            f"{component}: the engine inspector's answer is of an unknown form "
            f"({type(error).__name__}: {error}); this version of TensorRT has not been tried"
        ) from error
    fused = [layer["name"] for layer in layers if ATTENTION.search(layer["kernel"])]
    return {
        "layers": len(layers),
        "layer_kinds": dict(Counter(layer["kind"] for layer in layers).most_common()),
        "output_types": dict(Counter(layer["type"] for layer in layers).most_common()),
        "fused_attention": {"layers": len(fused), "first": fused[:LISTED]},
    }


def _layer(value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {"name": value, "kind": "unknown", "type": "unknown", "kernel": value}
    if not isinstance(value, dict):
        raise TypeError(f"a layer that is a {type(value).__name__}")
    outputs = value.get("Outputs") or [{}]
    kernel = " ".join(str(value.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    return {
        "name": str(value["Name"]),
        "kind": str(value.get("LayerType", "unknown")),
        "type": str(outputs[0].get("Datatype", outputs[0].get("Format/Datatype", "unknown"))),
        "kernel": kernel,
    }
