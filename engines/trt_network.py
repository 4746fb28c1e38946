"""A parsed TensorRT network, compared with the contract and described before anything is built.

Types of a strongly typed network are those of its graph, so what an engine will compute in can be
read here, without a GPU. Which kernels TensorRT then chooses, it cannot tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gentron.contract import Component, TensorSpec
from gentron.engines.compiler import Facts
from gentron.errors import BackendError

NAMES = {  # TensorRT's name of a type
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
OF_PRECISION = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
BYTES = {"FLOAT": 4, "INT32": 4, "INT64": 8, "BOOL": 1, "INT8": 1, "UINT8": 1, "FP8": 1}
NARROW = frozenset({"HALF", "BF16"})
# They move numbers and do not compute with them.
PASSIVE = frozenset({"CAST", "CONCATENATION", "CONSTANT", "GATHER", "IDENTITY", "SELECT", "SHAPE"})
PASSIVE |= {"SHUFFLE", "SLICE", "SQUEEZE", "UNSQUEEZE"}
PRODUCTS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"})
# Between a product and the softmax over it: scale, mask, a wider type, a view.
AROUND_SOFTMAX = frozenset({"CAST", "ELEMENTWISE", "SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE"})
# A T5 encoder keeps one product of four in float32, a small conditioner a third of its weights.
LEAST_SHARE = 0.5  # of the products' weights, that must compute in the type asked for
LISTED = 20  # islands by name
# With one modulation for all blocks, as PixArt has, all of its products are in float32.
MAY_BE_FLOAT32 = frozenset({"conditioner"})


def check_contract(network: Any, component: Component, compute: str) -> None:
    """Inputs and outputs one to one with the contract: names in order, types, ranks, fixed sizes,
    and the inputs' axes by name (TensorRT takes equal names for equal sizes).

    Raises BackendError that names the first difference.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for kind, tensors, specs in (
        ("inputs", inputs, component.inputs),
        ("outputs", outputs, component.outputs),
    ):
        found, expected = [t.name for t in tensors], [s.name for s in specs]
        if found != expected:
            raise BackendError(
                f"{component.name}: the graph's {kind} are {', '.join(found)}; the contract's are "
                f"{', '.join(expected)}; export the bundle again"
            )
        for tensor, spec in zip(tensors, specs, strict=True):
            if difference := _difference(tensor, spec, compute, named=kind == "inputs"):
                raise BackendError(
                    f"{component.name}.{spec.name}: the graph has {difference}; export the bundle "
                    "again"
                )


def _difference(tensor: Any, spec: TensorSpec, compute: str, *, named: bool) -> str:
    wanted = NAMES[compute if spec.dtype == "compute" else spec.dtype]
    if tensor.dtype.name != wanted:
        return f"type {tensor.dtype.name}, the contract says {wanted}"
    try:
        sizes = tuple(tensor.shape)
    except ValueError:  # of a tensor whose rank TensorRT could not infer
        return f"no known rank, the contract says {len(spec.axes)}"
    if len(sizes) != len(spec.axes):
        return f"rank {len(sizes)}, the contract says {len(spec.axes)} {spec.axes}"
    for position, (size, axis) in enumerate(zip(sizes, spec.axes, strict=True)):
        fixed = axis if isinstance(axis, int) else -1
        if size != fixed:
            found = "a free size" if size < 0 else f"the fixed size {size}"
            return f"{found} at axis {position}, the contract says {axis}"
        name = tensor.get_dimension_name(position)
        if isinstance(axis, str) and (named or name) and name != axis:
            return f"axis {position} named {name!r}, the contract says {axis!r}"
    return ""


@dataclass(frozen=True)
class Layer:
    """One layer, without TensorRT."""

    name: str
    kind: str
    dtype: str  # of the first output
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    weights: int = 0  # elements that it holds itself
    weight_bytes: int = 0


def read_layers(trt: Any, network: Any) -> list[Layer]:
    return [_read(trt, network.get_layer(i)) for i in range(network.num_layers)]


def _read(trt: Any, raw: Any) -> Layer:
    kind = raw.type.name
    inputs = [raw.get_input(i) for i in range(raw.num_inputs)]
    outputs = [raw.get_output(i) for i in range(raw.num_outputs)]
    held = []
    if kind == "CONSTANT":
        raw.__class__ = trt.IConstantLayer  # get_layer gives the base class
        held = [raw.weights]
    elif kind == "CONVOLUTION":
        raw.__class__ = trt.IConvolutionLayer
        held = [raw.kernel, raw.bias]
    elif kind == "DECONVOLUTION":
        raw.__class__ = trt.IDeconvolutionLayer
        held = [raw.kernel, raw.bias]
    return Layer(
        name=raw.name,
        kind=kind,
        dtype=outputs[0].dtype.name if outputs else "",
        reads=tuple(tensor.name for tensor in inputs if tensor is not None),
        makes=tuple(tensor.name for tensor in outputs),
        weights=max((stored.size for stored in held), default=0),
        weight_bytes=sum(stored.nbytes for stored in held),
    )


class LayerGraph:
    """Layers by the tensors that they make and read."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self._maker = {name: layer for layer in layers for name in layer.makes}
        self._readers: dict[str, list[Layer]] = {}
        for layer in layers:
            for name in layer.reads:
                self._readers.setdefault(name, []).append(layer)

    def before(self, layer: Layer) -> Iterator[Layer]:
        return (self._maker[name] for name in layer.reads if name in self._maker)

    def after(self, layer: Layer) -> Iterator[Layer]:
        return (reader for name in layer.makes for reader in self._readers.get(name, ()))

    def product_weights(self, product: Layer) -> int:
        """Elements of the constant that it multiplies by; 0 for a product of two activations."""
        return max(product.weights, *map(self._constant, self.before(product)), 0)

    def _constant(self, layer: Layer) -> int:
        while layer.kind in PASSIVE and layer.kind != "CONSTANT":
            inputs = list(self.before(layer))
            if not inputs:
                return 0
            layer = inputs[0]
        return layer.weights if layer.kind == "CONSTANT" else 0

    def is_attention(self, softmax: Layer) -> bool:
        """product -> softmax -> product, as kernels of fused attention are found."""
        return self._reaches_product(softmax, back=True) and self._reaches_product(
            softmax, back=False
        )

    def _reaches_product(self, softmax: Layer, *, back: bool) -> bool:
        step = self.before if back else self.after
        waiting, seen = list(step(softmax)), set()
        while waiting:
            layer = waiting.pop()
            if layer.kind == "MATRIX_MULTIPLY":
                return True
            if layer.kind in AROUND_SOFTMAX and layer.name not in seen:
                seen.add(layer.name)
                waiting += step(layer)
        return False

    def weight_bytes(self) -> int:
        """Of all constants, in the type that they are computed in: a cast of one is folded."""
        total = 0
        for layer in self.layers:
            casts = [BYTES.get(r.dtype, 2) for r in self.after(layer) if r.kind == "CAST"]
            widened = layer.weights * max(casts, default=0) if layer.kind == "CONSTANT" else 0
            total += max(layer.weight_bytes, widened)
        return total


def precision_facts(layers: Sequence[Layer]) -> Facts:
    """What a network computes in: layers by kind and by type, float32 islands of a 16-bit graph,
    products and their weights by type, attention by form."""
    graph = LayerGraph(layers)
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    weights: Counter[str] = Counter()
    for product in products:
        weights[product.dtype] += graph.product_weights(product)
    facts: Facts = {
        "layers": len(layers),
        "layer_kinds": _counts(layer.kind for layer in layers),
        "layer_types": _counts(layer.dtype for layer in layers if layer.dtype),
        "products": _counts(layer.dtype for layer in products),
        "product_weights": {name: weights[name] for name in sorted(weights)},
        "stored_weights": _stored(layers),
        "weight_bytes": graph.weight_bytes(),
        "attention": {
            "products_around_softmax": sum(
                graph.is_attention(layer) for layer in layers if layer.kind == "SOFTMAX"
            ),
            "attention_layers": sum(layer.kind == "ATTENTION_INPUT" for layer in layers),
        },
    }
    if any(layer.dtype in NARROW for layer in products):
        islands = [x for x in layers if x.dtype == "FLOAT" and x.kind not in PASSIVE]
        facts["float32_islands"] = {
            "layers": len(islands),
            "kinds": _counts(layer.kind for layer in islands),
            "first": [layer.name for layer in islands[:LISTED]],
        }
    return facts


def product_share(facts: Facts, precision: str) -> float:
    """The share of the products' weights that computes in a precision."""
    weights: dict[str, int] = facts["product_weights"]
    return weights.get(OF_PRECISION[precision], 0) / max(1, sum(weights.values()))


def check_precision(facts: Facts, precision: str, component: str) -> None:
    """Raises BackendError where the network does not compute in what was asked for: a 16-bit type
    in at least `LEAST_SHARE`, float32 in everything. A conditioner whose weights are stored in
    float32, but for tables that are added, keeps them."""
    share = product_share(facts, precision)
    least = 1.0 if precision == "fp32" else LEAST_SHARE
    if component in MAY_BE_FLOAT32 and _is_stored_in_float32(facts):
        return
    if share < least:
        named, products = OF_PRECISION[precision], facts["products"]
        raise BackendError(
            f"{component}: {precision} was asked for, but {share:.1%} of the weights of its "
            f"products ({products.get(named, 0)} of {sum(products.values())} products) compute in "
            f"it, and {least:.0%} have to; export the bundle again in {precision}, or ask for "
            "another precision"
        )


def _stored(layers: Sequence[Layer]) -> dict[str, int]:
    """Elements of constants by the type they are stored in."""
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.kind == "CONSTANT":
            found[layer.dtype] += layer.weights
    return {name: found[name] for name in sorted(found)}


def _is_stored_in_float32(facts: Facts) -> bool:
    by_type: dict[str, int] = facts["stored_weights"]
    return by_type.get("FLOAT", 0) > 10 * sum(by_type.get(name, 0) for name in NARROW)


def _counts(names: Iterator[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
