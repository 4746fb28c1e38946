"""PyTorch modules that hold one block's weights at a time: the reference for models of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gentron.export.storage import TORCH_TYPES
from gentron.weights import StoredTensor

BlockDone = Callable[[str, Tensor], None]  # (block's name in the module, its first output)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have parameters of a shape and type only; their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None:
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def read_tensor(stored: StoredTensor) -> Tensor:
    """Reads, and does not map, so that the pages do not count as this process's memory."""
    raw = np.fromfile(stored.file, np.uint8, count=stored.length, offset=stored.offset)
    kind = TORCH_TYPES.get(stored.dtype, torch.int64)
    return torch.from_numpy(raw).view(kind).reshape(stored.shape)


def stream_weights(
    build: Callable[[], nn.Module],
    tensors: Mapping[str, StoredTensor],
    *,
    block_done: BlockDone = lambda name, output: None,
) -> nn.Module:
    """The module `build` makes, whose weights come from disk when a block runs and go after it.

    A block is what lies directly in a ModuleList; whatever lies outside of one is loaded layer by
    layer. `tensors` has the module's parameters and persistent buffers by name; parameters take
    the type they were built in.
    """
    with without_weights():
        module = build().eval()
    units = dict(blocks(module))
    for name, layer in module.named_modules():
        inside = any(name == unit or name.startswith(f"{unit}.") for unit in units)
        if not inside and any(True for _ in layer.parameters(recurse=False)):
            _attach(layer, name, tensors, recurse=False)
    for name, block in units.items():
        _attach(block, name, tensors, recurse=True)
        block.register_forward_hook(
            lambda _, __, output, name=name: block_done(name, _first(output))
        )
    own = set(module.state_dict()) - {name for name, _ in module.named_parameters()}
    assert not own - set(tensors), own - set(tensors)
    for name in own:
        module.get_buffer(name).copy_(read_tensor(tensors[name]))
    return module


def blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost entries of ModuleLists, in order; a list within a list counts by entry."""

    def below(name: str, child: nn.Module, listed: bool) -> Iterator[tuple[str, nn.Module]]:
        if listed and not isinstance(child, nn.ModuleList):
            yield name, child
            return
        for part, grandchild in child.named_children():
            inner = f"{name}.{part}" if name else part
            yield from below(inner, grandchild, isinstance(child, nn.ModuleList))

    yield from below("", module, False)


def _attach(
    layer: nn.Module, name: str, tensors: Mapping[str, StoredTensor], *, recurse: bool
) -> None:
    empty: dict[str, nn.Parameter] = {}

    def load(*_: object) -> None:
        for parameter, value in list(layer.named_parameters(recurse=recurse)):
            empty[parameter] = value
            stored = read_tensor(tensors[f"{name}.{parameter}" if name else parameter])
            _put(layer, parameter, nn.Parameter(stored.to(value.dtype), requires_grad=False))

    def release(*_: object) -> None:
        for parameter, value in empty.items():
            _put(layer, parameter, value)
        empty.clear()

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(release, always_call=True)


def _put(layer: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(owner), leaf, value)


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
