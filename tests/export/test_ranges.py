"""The range audit sees what an engine that computes wider than float16 cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gentron.errors import ParityError
from gentron.export.components import parts
from gentron.export.parity import audit_ranges, block_names
from gentron.export.ranges import MAXIMUM, Peak, RangeAudit, audit, widened, with_maxima
from gentron.export.source import read_source
from gentron.export.staged import StagedGraph


def scaling_model(factor: float) -> onnx.ModelProto:
    """y = (x * factor) / factor in float16: exact in theory, an overflow on the way."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "factor"], ["large"]),
            helper.make_node("Div", ["large", "factor"], ["small"]),
            helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
        ],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.float16(factor), "factor")],
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4])
            for name in ("large", "small")
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def audited(model: onnx.ModelProto, values: list[float]) -> tuple[RangeAudit, np.ndarray]:
    wide, tensors = widened(model)
    staged = StagedGraph(with_maxima(wide, tensors), Path(), [])
    outputs = staged.run([{"x": np.asarray(values, np.float32)}])
    return audit(tensors, outputs), outputs[0]["y"]


def test_an_overflow_on_the_way_is_found_and_named():
    found, y = audited(scaling_model(1000), [1.0, -400.0, 3.0, 0.0])
    assert np.allclose(y, [1, -400, 3, 0])  # float32 hides it
    assert found.tensors == 2
    assert found.highest[0] == Peak("large", "Mul", 400_000.0)
    assert not found.passed
    with pytest.raises(ParityError, match=r"part: large \(Mul\) reaches 4e\+05.*--bf16"):
        found.require("part")


def test_a_quarter_of_the_range_is_the_limit():
    assert audited(scaling_model(1000), [16.376, 0, 0, 0])[0].passed
    assert not audited(scaling_model(1000), [16.377, 0, 0, 0])[0].passed


def test_the_largest_over_all_inputs_counts():
    wide, tensors = widened(scaling_model(10))
    staged = StagedGraph(with_maxima(wide, tensors), Path(), [])
    runs = staged.run([{"x": np.full(4, v, np.float32)} for v in (1, -7, 2)])
    assert audit(tensors, runs).highest[0].largest == 70


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(value):
    runs = [{f"a{MAXIMUM}": np.float32(1), f"b{MAXIMUM}": np.float32(value)}]
    found = audit({"a": "Add", "b": "Mul"}, runs)
    assert not found.passed
    assert found.highest[0].tensor == "b"


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "denoiser", "vae_decoder"])
def test_every_16_bit_tensor_of_a_graph_is_audited(tiny_video_bundle, name):
    from gentron.bundle import Bundle
    from gentron.probe import load_probes

    part = parts(read_source(tiny_video_bundle))[name]
    graph = tiny_video_bundle / part.component.graph_file("fp16")
    probes = tiny_video_bundle / Bundle.open(tiny_video_bundle).manifest.probes[name]
    cases = [case for case, _ in load_probes(probes)]
    found = audit_ranges(part, graph, cases)
    model = onnx.load(graph, load_external_data=False)
    made = {n for node in model.graph.node for n in node.output}
    narrow = {v.name for v in (*model.graph.value_info, *model.graph.output)
              if v.type.tensor_type.elem_type == TensorProto.FLOAT16} & made  # fmt: skip
    assert found.tensors == len(narrow) > 10
    assert found.passed


def test_a_widened_graph_computes_what_the_float32_graph_computes(tiny_video_bundle):
    """Only constants that float16 rounded are left to differ."""
    from gentron.probe import ProbeCase, probe_inputs, probe_sizes

    source = read_source(tiny_video_bundle)
    part = parts(source)["denoiser"]
    case = ProbeCase(5, probe_sizes(part.component, source.config)[1])
    feed = probe_inputs(part.component, case)
    outputs = []
    for precision in ("fp16", "fp32"):
        graph = tiny_video_bundle / part.component.graph_file(precision)
        model = onnx.load(graph, load_external_data=False)
        if precision == "fp16":
            model, _ = widened(model)
            kinds = {v.type.tensor_type.elem_type for v in model.graph.value_info}
            assert TensorProto.FLOAT16 not in kinds
        outputs += StagedGraph(model, graph.parent, block_names(part)).run([feed])
    wide, reference = (o["next_state"] for o in outputs)
    assert np.abs(wide - reference).max() < 1e-3 * np.abs(reference).max()
