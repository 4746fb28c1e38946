"""What the exported graphs look like: what compilers fuse, and nothing they choke on."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gentron.agreement import TOLERANCES, compare
from gentron.bundle import Bundle
from gentron.engines import backend_named, bundle_graph
from gentron.export.component import stored_weights
from gentron.export.components import Part, parts
from gentron.export.parity import reference
from gentron.export.source import read_source
from gentron.export.tracing import OPSET
from gentron.probe import ProbeCase, probe_inputs
from gentron.weights import StoredTensor

COMPONENTS = ("text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser",
              "vae_decoder")  # fmt: skip
GRAPHS = [(name, precision) for name in COMPONENTS for precision in ("fp16", "fp32")]


@pytest.fixture(scope="module")
def bundle(tiny_video_bundle: Path) -> Bundle:
    return Bundle.open(tiny_video_bundle)


@pytest.fixture(scope="module")
def models(bundle) -> dict[tuple[str, str], ir.Model]:
    return {key: ir.load(bundle.graph(*key)) for key in GRAPHS}


def kinds(model: ir.Model) -> collections.Counter:
    return collections.Counter(node.op_type for node in model.graph)


def weights(model: ir.Model) -> list[ir.ExternalTensor]:
    """What the graph reads from the bundle's weights; small constants stay inside it."""
    values = (v.const_value for v in model.graph.initializers.values())
    return [value for value in values if isinstance(value, ir.ExternalTensor)]


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_every_axis_of_the_contract_is_symbolic_and_named(bundle, models, name, precision):
    component, graph = bundle.components[name], models[name, precision].graph
    for values, specs in ((graph.inputs, component.inputs), (graph.outputs, component.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            axes = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            assert axes == list(spec.axes), spec.name


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_weights_stay_outside_the_graph(bundle, models, name, precision):
    model = models[name, precision]
    assert weights(model)
    for initializer in model.graph.initializers.values():
        value = initializer.const_value
        assert isinstance(value, ir.ExternalTensor) or value.nbytes < 8192, initializer.name
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                assert attribute.value.nbytes < 8192, node.name
    assert bundle.graph(name, precision).stat().st_size < 2**20


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_the_checker_passes_and_the_opset_has_gelu(bundle, name, precision):
    file = bundle.graph(name, precision)
    onnx.checker.check_model(str(file), full_check=True)
    opsets = {o.domain: o.version for o in onnx.load(file, load_external_data=False).opset_import}
    assert opsets[""] == OPSET >= 20


def test_both_precisions_read_the_same_bytes(models):
    for name in COMPONENTS:
        places = [
            {(w.location, w.offset, w.length) for w in weights(models[name, precision])}
            for precision in ("fp16", "fp32")
        ]
        assert places[0] == places[1], name


@pytest.mark.parametrize("name", ["text_encoder", "denoiser"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_norms_are_single_nodes(models, name, precision):
    found = kinds(models[name, precision])
    assert found["LayerNormalization"] > 0
    assert not found["Pow"]
    assert not found["ReduceMean"]


def test_each_block_has_one_gelu_and_three_fusible_attentions(bundle, models):
    model = models["denoiser", "fp16"]
    depth = bundle.config.depth
    assert kinds(model)["Gelu"] == depth
    assert kinds(model)["Softmax"] == 3 * depth  # spatial, cross, temporal
    for node in model.graph:
        if node.op_type == "Gelu":
            assert node.attributes["approximate"].as_string() == "tanh"
        if node.op_type == "Softmax":
            assert _feeds_matmul(node)


def _feeds_matmul(softmax: ir.Node) -> bool:
    """Softmax -> (Cast) -> MatMul: the second half of the pattern that attention kernels match."""
    users = [use.node for use in softmax.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Cast":
        users = [use.node for use in users[0].outputs[0].uses()]
    return [user.op_type for user in users] == ["MatMul"]


def test_the_tail_of_the_float16_denoiser_is_float32(models):
    """Equation 6 multiplies rounding by the sum of its weights, 14 at 7.5 and 1.3."""
    graph = models["denoiser", "fp16"].graph
    final = graph.initializers["denoiser.final.weight"]
    assert final.const_value.dtype == ir.DataType.FLOAT
    assert graph.outputs[0].dtype == ir.DataType.FLOAT
    stored = weights(models["denoiser", "fp16"])
    assert sum(w.dtype == ir.DataType.FLOAT16 for w in stored) == len(stored) - 2


def test_the_residual_stream_of_t5_is_float32_in_float16_graphs(models):
    graph = models["text_encoder_2", "fp16"].graph
    wide = [n for n in graph if n.op_type == "MatMul" and n.outputs[0].dtype == ir.DataType.FLOAT]
    assert len(wide) >= 2  # `wo` of each of the two layers


def test_graphs_hold_no_trace_of_the_machine_that_made_them(bundle):
    for key in GRAPHS:
        data = bundle.graph(*key).read_bytes()
        for leak in (b"site-packages", b"/home", b"/root", b".py"):
            assert leak not in data, key


SIZES = [
    {"B": 1, "R": 1, "F": 1, "T": 1, "U": 1, "K": 1, "h": 4, "w": 4},
    {"B": 3, "R": 7, "F": 2, "T": 6, "U": 2, "K": 5, "h": 6, "w": 14},
    {"B": 1, "R": 3, "F": 5, "T": 1, "U": 9, "K": 1, "h": 10, "w": 4},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", COMPONENTS[2:])
def test_graphs_equal_torch_at_sizes_never_traced(bundle, name, sizes):
    component = bundle.components[name]
    used = {a for spec in component.inputs for a in spec.axes if isinstance(a, str)}
    case = ProbeCase(77, {axis: size for axis, size in sizes.items() if axis in used})
    part, tensors = _stored(bundle, name)
    (wanted,) = reference(part, tensors, [case]).outputs
    with backend_named("onnxruntime") as backend:
        engine = backend.load(bundle_graph(bundle, name, "fp32"), "fp32")
        outputs = engine.run(probe_inputs(component, case))
        engine.close()
    for agreement in compare(component, "float32", case, outputs, wanted, "onnxruntime"):
        assert agreement.passed, agreement


def _stored(bundle: Bundle, name: str) -> tuple[Part, Mapping[str, StoredTensor]]:
    part = parts(read_source(bundle.path))[name]
    return part, stored_weights(bundle.path, part).tensors


def test_the_report_names_the_float32_islands_and_the_share_of_16_bits(bundle, models):
    report = json.loads((bundle.path / "export-report.json").read_text())["components"]
    for found in report:
        facts = found["graphs"][0]
        model = models[found["component"], "fp16"]
        made = {v.name: node for node in model.graph for v in node.outputs}
        for tensor in facts["float32_islands"]["tensors"]:
            assert made[tensor].outputs[0].dtype == ir.DataType.FLOAT
        stored = weights(model)
        narrow = sum(w.nbytes for w in stored if w.dtype == ir.DataType.FLOAT16)
        share = narrow / sum(w.nbytes for w in stored)
        assert facts["share_of_weights_in_16_bits"] == pytest.approx(share, abs=1e-6)
    islands = {f["component"]: f["graphs"][0]["float32_islands"]["operators"] for f in report}
    assert islands["denoiser"]["Softmax"] == 3 * bundle.config.depth
    assert islands["denoiser"]["LayerNormalization"] == 1  # the final one
    assert "float32_islands" not in report[0]["graphs"][1]


@pytest.mark.parametrize("name", COMPONENTS)
def test_float16_graphs_parse_as_strongly_typed_networks(bundle, name):
    """Strong typing refuses an operator whose inputs differ in type; axes keep their names."""
    rtx = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="TensorRT-RTX's parser is not installed: pip install 'gentron[rtx]'",
    )
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.graph(name, "fp16")))
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert parsed, errors
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    for spec in bundle.components[name].inputs:
        for position, axis in enumerate(spec.axes):
            found = inputs[spec.name].get_dimension_name(position)
            assert found == (axis if isinstance(axis, str) else None), (spec.name, axis)
    halves = [network.get_layer(i).get_output(0).dtype for i in range(network.num_layers)]
    assert rtx.DataType.HALF in halves


def test_a_tolerance_is_tighter_the_wider_the_type():
    limits = [TOLERANCES[t].max_relative for t in ("float32", "float16", "bfloat16")]
    assert limits == sorted(limits)
    assert np.finfo(np.float16).eps < TOLERANCES["float16"].max_relative < 0.05
