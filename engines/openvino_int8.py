"""Weights of 8 bits for OpenVINO's CPU, by NNCF and without data.

Each output channel of a product's weights gets a scale and a zero of its own; activations are
quantised while they are multiplied, in groups. What that costs is measured on the golden probes,
and a model that loses more than `agreement.TOLERANCES["int8"]` allows is not kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from typing import Any

from gentron.errors import BackendError

# Values that share a scale when activations are quantised.
GROUP = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}


def nncf_version() -> str:
    """Raises BackendError where NNCF is not installed; imports nothing."""
    try:
        return importlib.metadata.version("nncf")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            "int8: weights are rounded by nncf, which is not installed; run: "
            "pip install 'gentron[int8]'"
        ) from error


def round_weights(model: Any) -> Any:
    """An openvino.Model with the weights of its products in 8 bits; raises BackendError if it has
    none that NNCF finds."""
    nncf_version()
    import nncf
    from openvino.passes import ConstantFolding, Manager

    # Not by nncf.set_log_level, which also changes handlers that are the program's own.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # NNCF looks for a constant right before a product, and the graphs have a cast and a transpose
    # in between.
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)
    with contextlib.redirect_stdout(io.StringIO()):  # which is for results, not for its bar
        rounded = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    if not any(_is_int8(node) for node in rounded.get_ops()):
        raise BackendError("int8: no weights were found in the graph; leave --int8 out")
    return rounded


def _is_int8(node: Any) -> bool:
    return bool(
        node.get_type_name() == "Constant"
        and node.output(0).get_element_type().get_type_name() in ("i8", "u8")
    )
