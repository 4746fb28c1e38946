"""A parsed network against the contract, and what it will compute in. TensorRT-RTX parses here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gentron.bundle import Bundle
from gentron.contract import TensorSpec
from gentron.engines.graphs import bundle_graph
from gentron.engines.trt_log import Messages, logger_for
from gentron.engines.trt_network import (
    LISTED,
    Layer,
    check_contract,
    check_precision,
    precision_facts,
    product_share,
    read_layers,
)
from gentron.errors import BackendError

trt = pytest.importorskip("tensorrt_rtx_bindings")


class Parsed:
    """A network, and the parser and builder that it needs to live."""

    def __init__(self, file: Path):
        self.logger = logger_for(trt, Messages())
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(1)
        self.parser = trt.OnnxParser(self.network, self.logger)
        assert self.parser.parse_from_file(str(file))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def parsed(bundle):
    """By component and precision."""
    found: dict[tuple[str, str], Parsed] = {}

    def get(name: str, precision: str = "fp16") -> Parsed:
        key = (name, precision)
        if key not in found:
            found[key] = Parsed(bundle_graph(bundle, name, precision).file)
        return found[key]

    return get


@pytest.fixture(scope="module")
def facts(parsed):
    def get(name: str, precision: str = "fp16"):
        return precision_facts(read_layers(trt, parsed(name, precision).network))

    return get


def test_every_graph_of_a_bundle_is_the_contracts(bundle, parsed):
    for name, component in bundle.components.items():
        check_contract(parsed(name).network, component, "float16")
        check_contract(parsed(name, "fp32").network, component, "float32")


def changed(component, index, outputs=False, **values):
    """The component with another tensor of that index."""
    field = "outputs" if outputs else "inputs"
    specs = list(getattr(component, field))
    specs[index] = replace(specs[index], **values)
    return replace(component, **{field: tuple(specs)})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: changed(c, 0, name="latents"), "inputs are state, .*the contract's are latents"),
        (lambda c: replace(c, inputs=c.inputs[::-1]), "inputs are state"),
        (lambda c: replace(c, inputs=c.inputs[:-1]), "inputs are state"),
        (lambda c: replace(c, outputs=(*c.outputs, TensorSpec("more", "bool", ("B",)))), "outputs"),
        (lambda c: changed(c, 0, dtype="float16"), r"state: .*type FLOAT, the contract says HALF"),
        (lambda c: changed(c, 0, axes=("B", 3)), r"state: .*rank 6, the contract says 2"),
        (lambda c: changed(c, 0, axes=("B", 3, "F", 8, "h", "w")), "fixed size 4 at axis 3.* 8"),
        (lambda c: changed(c, 0, axes=("B", "S", "F", 4, "h", "w")), "fixed size 3 at axis 1.* S"),
        (lambda c: changed(c, 0, axes=(1, 3, "F", 4, "h", "w")), "a free size at axis 0.* 1;"),
        (lambda c: changed(c, 1, axes=("B",)), "row_sample: .*axis 0 named 'R'.* 'B'"),
        (lambda c: changed(c, 0, True, axes=("B", 3, "F", 4, "h")), "next_state: .*rank 6"),
        (lambda c: changed(c, 1, True, dtype="int64"), "bad: .*type BOOL.* INT64"),
    ],
)
def test_any_difference_from_the_contract_is_named(bundle, parsed, change, expected):
    component = change(bundle.components["denoiser"])
    with pytest.raises(BackendError, match=f"{expected}.*export the bundle again") as caught:
        check_contract(parsed("denoiser").network, component, "float16")
    assert "\n" not in str(caught.value)


def test_a_float32_graph_is_not_the_contract_of_a_16_bit_engine(bundle, parsed):
    with pytest.raises(BackendError, match=r"modulation: .*FLOAT, the contract says HALF"):
        check_contract(parsed("denoiser", "fp32").network, bundle.components["denoiser"], "float16")


def test_a_denoiser_computes_in_16_bits_with_its_tail_in_float32(bundle, facts):
    found = facts("denoiser")
    config = bundle.config
    assert product_share(found, "fp16") > 0.99
    # The final linear and the solver's update.
    assert found["products"]["FLOAT"] == 2
    # Self-attention and cross-attention of every block.
    assert found["attention"] == {
        "products_around_softmax": 2 * config.depth,
        "attention_layers": 0,
    }
    islands = found["float32_islands"]
    assert islands["kinds"]["SOFTMAX"] == 2 * config.depth
    assert len(islands["first"]) == min(LISTED, islands["layers"])
    assert sum(islands["kinds"].values()) == islands["layers"]
    assert sum(found["layer_kinds"].values()) == found["layers"]
    json.dumps(found)


def test_a_t5_encoder_keeps_one_product_of_each_block_in_float32(facts):
    found = facts("text_encoder_2")
    assert found["products"] == {"HALF": 16, "FLOAT": 2}
    assert product_share(found, "fp16") == pytest.approx(0.8)


def test_convolutions_count_with_their_weights(facts):
    halves, floats = facts("vae_decoder"), facts("vae_decoder", "fp32")
    assert halves["product_weights"].keys() == {"HALF"}
    assert floats["product_weights"] == {"FLOAT": halves["product_weights"]["HALF"]}
    assert halves["product_weights"]["HALF"] > 20_000


def test_weights_that_a_cast_widens_take_the_memory_of_the_wider_type(facts):
    # The same stored float16 weights, computed in float32.
    half, full = facts("text_projection"), facts("text_projection", "fp32")
    assert 1.8 < full["weight_bytes"] / half["weight_bytes"] < 2.2


def test_every_component_in_16_bits_passes_the_bound_and_in_float32_has_no_narrow_product(facts):
    names = ("text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser",
             "vae_decoder")  # fmt: skip
    for name in names:
        check_precision(facts(name), "fp16", name)
        check_precision(facts(name, "fp32"), "fp32", name)
        assert "float32_islands" not in facts(name, "fp32")


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "vae_decoder"])
def test_a_precision_that_was_asked_for_and_is_not_there_is_an_error_with_the_number(facts, name):
    with pytest.raises(BackendError, match=rf"{name}: fp16 was asked for, but 0.0% .*\(0 of \d+"):
        check_precision(facts(name, "fp32"), "fp16", name)
    with pytest.raises(BackendError, match=r"bf16 was asked for, but 0.0%"):
        check_precision(facts(name), "bf16", name)
    with pytest.raises(BackendError, match=r"fp32 was asked for.*100% have to"):
        check_precision(facts(name), "fp32", name)


def chain(*kinds: str) -> list[Layer]:
    """Layers that each read the one before."""
    return [
        Layer(f"layer_{i}", kind, "HALF", (f"t{i}",), (f"t{i + 1}",))
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        (("MATRIX_MULTIPLY", "SOFTMAX", "MATRIX_MULTIPLY"), 1),
        (("MATRIX_MULTIPLY", "ELEMENTWISE", "CAST", "SOFTMAX", "CAST", "MATRIX_MULTIPLY"), 1),
        (("MATRIX_MULTIPLY", "NORMALIZATION", "SOFTMAX", "MATRIX_MULTIPLY"), 0),
        (("MATRIX_MULTIPLY", "SOFTMAX", "REDUCE"), 0),
        (("SOFTMAX", "MATRIX_MULTIPLY"), 0),
    ],
)
def test_attention_is_a_softmax_between_two_products(kinds, count):
    assert precision_facts(chain(*kinds))["attention"]["products_around_softmax"] == count


def test_attention_layers_are_counted_as_such():
    found = precision_facts(chain("ATTENTION_INPUT", "ATTENTION_OUTPUT"))["attention"]
    assert found == {"products_around_softmax": 0, "attention_layers": 1}


def test_the_bound_is_by_weights_and_not_by_number_of_products():
    def product(index: int, dtype: str, weights: int) -> list[Layer]:
        return [
            Layer(f"w{index}", "CONSTANT", dtype, (), (f"w{index}",), weights, 2 * weights),
            Layer(f"p{index}", "MATRIX_MULTIPLY", dtype, ("x", f"w{index}"), (f"y{index}",)),
        ]

    many_small = [x for i in range(9) for x in product(i, "FLOAT", 10)]
    found = precision_facts([*many_small, *product(9, "HALF", 1000)])
    assert product_share(found, "fp16") == pytest.approx(1000 / 1090)
    check_precision(found, "fp16", "conditioner")
    found = precision_facts([*product(0, "FLOAT", 1001), *product(1, "HALF", 1000)])
    with pytest.raises(BackendError, match=r"50.0% of the weights.*1 of 2 products"):
        check_precision(found, "fp16", "conditioner")


def test_a_conditioner_that_is_stored_in_float32_keeps_it():
    """PixArt's: seven products in float32, and a table in 16 bits that is added."""

    def network(stored: str) -> list[Layer]:
        return [
            Layer("w", "CONSTANT", stored, (), ("w",), 1000, 4000),
            Layer("cast", "CAST", "FLOAT", ("w",), ("c",)),
            Layer("p", "MATRIX_MULTIPLY", "FLOAT", ("x", "c"), ("y",)),
            Layer("table", "CONSTANT", "HALF", (), ("t",), 20, 40),
        ]

    check_precision(precision_facts(network("FLOAT")), "fp16", "conditioner")
    for stored, name in (("HALF", "conditioner"), ("FLOAT", "denoiser")):
        with pytest.raises(BackendError, match=r"fp16 was asked for, but 0.0%"):
            check_precision(precision_facts(network(stored)), "fp16", name)
