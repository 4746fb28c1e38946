"""The reference in torch as a contender: the bundle's own weights, eager or compiled.

Its best settings on a CPU: fused attention, inference mode, weights frozen into the compiled code
with every kernel tuned, convolutions in channels-last layout, and no denormal numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gentron.bench.peers import allocator
from gentron.bench.runner import Array, Runner
from gentron.bench.work import EngineCall, Work
from gentron.contract import PRECISIONS, Component
from gentron.probe import in_compute_type, probe_inputs

TUNED = {"freezing": True, "max_autotune": True}


class TorchRunner(Runner):
    def __init__(self, work: Work, *, compiled: bool):
        import torch

        self._torch = torch
        set_up(work.threads)
        use_fused_attention()
        self._modules = [_module(work, call) for call in work.calls]
        components = [component for component, _ in self._modules]
        self._names = [[spec.name for spec in c.outputs] for c in components]
        self._functions = [compile_tuned(m) if compiled else m for _, m in self._modules]
        self._feeds = [
            [torch.from_numpy(v) for v in _feeds(component, call, work.precision)]
            for component, call in zip(components, work.calls, strict=True)
        ]
        if work.precision != "fp32":
            self._feeds = [
                [_cast(torch, value, spec.dtype, work.precision)
                 for value, spec in zip(feeds, component.inputs, strict=True)]
                for feeds, component in zip(self._feeds, components, strict=True)
            ]  # fmt: skip
        how = "compiled, frozen, max-autotune" if compiled else "eager"
        self.facts = {
            "label": f"torch {torch.__version__} {how}, fused attention{allocator()}",
            "device": "cpu",
            "precision": work.precision,
            "versions": {"torch": torch.__version__},
        }
        self._results: list[Any] = []

    def run(self) -> None:
        with self._torch.inference_mode():
            pairs = zip(self._functions, self._feeds, strict=True)
            self._results = [function(*feeds) for function, feeds in pairs]

    def outputs(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for number, result in enumerate(self._results):
            values = result if isinstance(result, tuple) else (result,)
            for name, value in zip(self._names[number], values, strict=True):
                wide = value.float() if value.is_floating_point() else value
                found[f"{number}.{name}"] = wide.numpy()
        return found


def set_up(threads: int) -> None:
    """Threads and denormals; before any computing."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)


def use_fused_attention() -> None:
    """`scaled_dot_product_attention` instead of the three operations that exported graphs need."""
    from torch.nn import functional

    from gentron.model import layers

    def attention(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        if q.dim() == 4:
            return functional.scaled_dot_product_attention(q, k, v, bias)
        batch, frames = q.shape[:2]  # the fused kernels take four axes
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if bias is not None:
            bias = bias.expand(batch, frames, *bias.shape[2:]).flatten(0, 1)
        out = functional.scaled_dot_product_attention(q, k, v, bias)
        return out.unflatten(0, (batch, frames))

    layers.attention = attention


def compile_tuned(module: Any) -> Any:
    import torch
    import torch._inductor.config as inductor

    for name, value in TUNED.items():
        setattr(inductor, name, value)
    return torch.compile(module, dynamic=False)


def load_module(part: Any, folder: Path, compute: str) -> Any:
    """A component's module with the stored weights, each in the type it was built in."""
    import torch

    from gentron.export.component import stored_weights
    from gentron.export.streamed import read_tensor, without_weights
    from gentron.export.tracing import default_dtype

    tensors = stored_weights(folder, part).tensors
    with default_dtype(compute), without_weights():
        module = part.build().eval()
    ready: dict[int, Any] = {}
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        if id(value) not in ready:
            loaded = read_tensor(tensors[name]).to(value.dtype)
            ready[id(value)] = torch.nn.Parameter(loaded, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, ready[id(value)])
    for name in set(module.state_dict()) - {n for n, _ in module.named_parameters()}:
        if name in tensors and name in dict(module.named_buffers()):
            module.get_buffer(name).copy_(read_tensor(tensors[name]))
    return module


def _module(work: Work, call: EngineCall) -> tuple[Component, Any]:
    import torch

    from gentron.export.components import parts
    from gentron.export.source import read_source

    folder = Path(work.bundle)
    part = parts(read_source(folder))[call.component]
    module = load_module(part, folder, PRECISIONS[work.precision])
    if call.component == "vae_decoder":
        module = module.to(memory_format=torch.channels_last)
    return part.component, module


def _feeds(component: Component, call: EngineCall, precision: str) -> list[Array]:
    compute = "float32" if precision == "bf16" else PRECISIONS[precision]
    feeds = in_compute_type(component, probe_inputs(component, call.case), compute)
    return [np.ascontiguousarray(feeds[spec.name]) for spec in component.inputs]


def _cast(torch: Any, value: Any, dtype: str, precision: str) -> Any:
    from gentron.contract import COMPUTE

    return value.to(getattr(torch, PRECISIONS[precision])) if dtype == COMPUTE else value
