"""Which kernels a built engine consists of, from TensorRT's engine inspector.

It needs an engine that is loaded, and so a GPU. `inspect_engine` has never run on one here;
`read_inspection` is tested on JSON of the documented form.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from typing import Any

from gentron.engines.compiler import Facts
from gentron.engines.trt_log import Messages, require
from gentron.errors import BackendError

log = logging.getLogger(__name__)

ATTENTION = re.compile(r"mha|attention|flash", re.IGNORECASE)  # _gemm_mha_v2, fmha, ...
LISTED = 20  # kernels of fused attention by name


# How the inspector spells types: "Half", "Row major linear FP16 format".
COMPUTES = {
    "fp16": re.compile(r"half|fp16|(?<!b)float16", re.IGNORECASE),
    "bf16": re.compile(r"bf16|bfloat16", re.IGNORECASE),
}


def inspect_engine(trt: Any, engine: Any, messages: Messages, component: str) -> Facts:
    """Facts of an engine that is loaded; those about types need DETAILED verbosity at build.

    An answer of a form that nobody has described leaves one fact, why there are no others.
    """
    inspector = require(engine.create_engine_inspector(), "inspecting", messages, component)
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return read_inspection(text, component)
    except BackendError as error:
        log.warning(str(error))
        return {"unknown": str(error)}


def check_kernels(facts: Facts, precision: str, component: str) -> None:
    """Raises BackendError where a 16-bit precision was asked for and no kernel computes in it.

    Says nothing about an engine whose types are not known.
    """
    types: dict[str, int] = facts.get("output_types", {})
    known = {name: count for name, count in types.items() if name != "unknown"}
    if precision in COMPUTES and known and not any(map(COMPUTES[precision].search, known)):
        found = ", ".join(f"{count} {name}" for name, count in known.items())
        raise BackendError(
            f"{component}: {precision} was asked for, and none of the engine's kernels computes in "
            f"it ({found}); ask for another --precision, and tell us"
        )


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
