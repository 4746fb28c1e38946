"""A PyTorch module, traced without weights, becomes an ONNX graph named by the contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gentron.contract import COMPUTE, Component
from gentron.export.link import WeightMap, link_weights

OPSET = 20  # the first with Gelu, whose tanh form compilers take as one layer
FOLD_LIMIT = 1024  # elements; larger constants stay as they are
# Sizes to trace with: at least 2, unequal, so that no axis is taken for a constant or for another.
EXAMPLE_SIZES = {"B": 2, "R": 5, "F": 3, "T": 7, "U": 4, "K": 3, "h": 8, "w": 12}
# diffusers' upsampler takes another path from 64 pictures on; frames are decoded a few at a time.
LARGEST = {"K": 63}
TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Traceable:
    """A component ready to trace: `build` makes the module, called under fake tensors."""

    component: Component
    build: Callable[[], nn.Module]
    # Symbolic sides are multiples of this: the patch size for the denoiser.
    side_unit: int = 1


def trace(traceable: Traceable, compute: str, weights: WeightMap) -> ir.Model:
    """The component's graph in `compute` precision ("float16", "bfloat16", "float32").

    Its weights are references into the bundle's safetensors files; nothing large is in memory.
    """
    component = traceable.component
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), default_dtype(compute):
        module = traceable.build().eval().requires_grad_(False)
        examples = tuple(
            torch.zeros(
                [EXAMPLE_SIZES[a] if isinstance(a, str) else a for a in spec.axes],
                dtype=TORCH_TYPES[compute] if spec.dtype == COMPUTE else getattr(torch, spec.dtype),
            )
            for spec in component.inputs
        )
        dims = _dims(traceable)
        shapes = tuple(
            {i: dims[a] for i, a in enumerate(spec.axes) if isinstance(a, str)}
            for spec in component.inputs
        )
        program = torch.export.export(
            _Positional(module), examples, dynamic_shapes={"inputs": shapes}, strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in component.inputs],
            output_names=[spec.name for spec in component.outputs],
        )
    assert onnx_program is not None
    model = onnx_program.model
    link_weights(model, weights, prefix="module.")
    optimize_ir(
        model,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=_should_fold,
    )
    _name_axes(model, component, compute)
    _strip(model)
    return model


class _Positional(nn.Module):
    """Takes the contract's inputs in order, whatever the wrapped module's signature is."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.module(*inputs)


def _dims(traceable: Traceable) -> dict[str, torch.export.Dim]:
    dims = {}
    for axis in EXAMPLE_SIZES:
        dims[axis] = torch.export.Dim(axis, max=LARGEST.get(axis))
        if axis in "hw" and traceable.side_unit > 1:
            dims[axis] = traceable.side_unit * torch.export.Dim(f"{axis}_patches")
    return dims


def _should_fold(node: ir.Node) -> bool | None:
    """Weights stay references: folding one would load it and copy it into the graph."""
    for value in node.inputs:
        if value is not None and isinstance(value.const_value, ir.ExternalTensor):
            return False
    return None


def _name_axes(model: ir.Model, component: Component, compute: str) -> None:
    """Contract letters instead of the tracer's s30; checks names, types and fixed sizes."""
    renamed: dict[str, str] = {}
    for values, specs in (
        (model.graph.inputs, component.inputs),
        (model.graph.outputs, component.outputs),
    ):
        assert [value.name for value in values] == [spec.name for spec in specs], component.name
        for value, spec in zip(values, specs, strict=True):
            wanted = compute if spec.dtype == COMPUTE else spec.dtype
            assert value.dtype is not None
            found = {"FLOAT": "float32", "BOOL": "bool"}.get(
                value.dtype.name, value.dtype.name.lower()
            )
            assert found == wanted, f"{component.name}.{spec.name}: {found}, contract {wanted}"
            assert value.shape is not None, spec.name
            assert len(value.shape) == len(spec.axes), spec.name
            for traced, axis in zip(value.shape, spec.axes, strict=True):
                symbolic = isinstance(traced, ir.SymbolicDim)
                assert symbolic == isinstance(axis, str), f"{spec.name}: axis {axis} is {traced}"
                if symbolic:
                    renamed[str(traced.value)] = str(axis)
                else:
                    assert traced == axis, f"{spec.name}: {traced}, contract {axis}"
            value.shape = ir.Shape(spec.axes)
    edges = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None or id(value) in edges:
                continue
            dims = [
                renamed.get(str(d.value)) if isinstance(d, ir.SymbolicDim) else d
                for d in value.shape
            ]
            value.shape = ir.Shape(dims)


def _strip(model: ir.Model) -> None:
    """No stack traces, paths or counters: two exports of one checkpoint are the same bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "gentron", None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


@contextmanager
def default_dtype(compute: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_TYPES[compute])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer logs its own internals at warning level; ours are errors or assertions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
