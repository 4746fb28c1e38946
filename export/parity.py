"""The gate every graph passes: equal to the torch module, within a written tolerance.

Small components run whole, large ones block by block (`staged`), with torch's own blocks compared
on the way: no more than one block's weights are in memory, and the outputs are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from gentron.agreement import Agreement, compare
from gentron.contract import Component
from gentron.export.components import Part
from gentron.export.ranges import RangeAudit, audit, widened, with_maxima
from gentron.export.staged import StagedGraph
from gentron.export.streamed import blocks, stream_weights, without_weights
from gentron.export.tracing import default_dtype
from gentron.probe import ProbeCase, in_compute_type, probe_inputs
from gentron.weights import StoredTensor

Array = npt.NDArray[Any]
Share = Callable[[float], None]
KEPT = 8_000_000  # bytes of one block's output
RELATED = 0.9  # cosine above which a tensor counts as the block's output, right or wrong
# Without the instructions torch computes float16 products one by one: only small models then.
SMALL_FOR_HALF = 20_000_000  # parameters


@dataclass
class Reference:
    """What torch computes in float32: outputs by case, and what came out of every block."""

    outputs: list[dict[str, Array]]
    blocks: dict[str, dict[int, Array]] = field(default_factory=dict)  # by number of the case


def reference(
    part: Part,
    tensors: Mapping[str, StoredTensor],
    cases: Sequence[ProbeCase],
    *,
    keep_blocks: bool = False,
) -> Reference:
    """Torch's float32 outputs for the probe cases, one block's weights in memory at a time."""
    found = Reference([])

    def block_done(name: str, output: Tensor) -> None:
        # At native size the outputs of all blocks together would take more than the weights do.
        if keep_blocks and output.nbytes < KEPT:
            case = len(found.outputs)
            found.blocks.setdefault(name, {})[case] = output.float().numpy().copy()

    module = stream_weights(part.build, tensors, block_done=block_done)
    for case in cases:
        found.outputs.append(_outputs(part.component, module, case, "float32"))
    return found


def _outputs(
    component: Component, module: torch.nn.Module, case: ProbeCase, compute: str
) -> dict[str, Array]:
    inputs = in_compute_type(component, probe_inputs(component, case), compute)
    with torch.inference_mode():
        out = module(*(torch.from_numpy(inputs[spec.name]) for spec in component.inputs))
    values = out if isinstance(out, tuple) else (out,)
    return {
        spec.name: np.ascontiguousarray(value.numpy())
        for spec, value in zip(component.outputs, values, strict=True)
    }


def check_graph(
    part: Part,
    graph: Path,
    compute: str,
    cases: Sequence[ProbeCase],
    wanted: Reference,
    side_factor: int,
    *,
    staged: bool = False,
    progress: Share = lambda share: None,
) -> list[Agreement]:
    """How a graph agrees with torch, on outputs and, if staged, after every block."""
    if staged:
        return _check_staged(part, graph, compute, cases, wanted, progress)
    outputs, runner = run_whole(part.component, graph, compute, cases, side_factor)
    return [
        agreement
        for case, got, ref in zip(cases, outputs, wanted.outputs, strict=True)
        for agreement in compare(part.component, compute, case, got, ref, runner)
    ]


def run_whole(
    component: Component,
    graph: Path,
    compute: str,
    cases: Sequence[ProbeCase],
    side_factor: int,
) -> tuple[list[dict[str, Array]], str]:
    """Runs the graph on every case, as a user would; returns the outputs and what ran it."""
    feeds = [in_compute_type(component, probe_inputs(component, c), compute) for c in cases]
    if compute == "bfloat16":
        return _evaluate(component, graph, feeds), "onnx.reference"
    from gentron.engines import Graph, backend_named

    with backend_named("onnxruntime") as backend:
        precision = {"float32": "fp32", "float16": "fp16"}[compute]
        # Never kept: without a digest nothing could find it again.
        engine = backend.load(Graph(component, graph, precision, side_factor, ""), precision)
        try:
            outputs = [engine.run(feed) for feed in feeds]
            return outputs, f"onnxruntime {engine.info.version}"
        finally:
            engine.close()


def _evaluate(
    component: Component, graph: Path, feeds: list[dict[str, Array]]
) -> list[dict[str, Array]]:
    """onnx's own evaluator: slow, but no CPU engine here computes in bfloat16."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(graph))
    names = [spec.name for spec in component.outputs]
    return [dict(zip(names, evaluator.run(names, feed), strict=True)) for feed in feeds]


def block_names(part: Part) -> list[str]:
    with without_weights():
        return [name for name, _ in blocks(part.build())]


def _check_staged(
    part: Part,
    graph: Path,
    compute: str,
    cases: Sequence[ProbeCase],
    wanted: Reference,
    progress: Share,
) -> list[Agreement]:
    component, runner = part.component, "onnxruntime, by blocks"
    model = onnx.load(graph, load_external_data=False)
    given = compute
    if compute == "bfloat16":  # no CPU engine has it, and onnx's evaluator takes days at this size
        model, _ = widened(model)
        given, runner = "float32", "onnxruntime, by blocks, widened to float32"
    feeds = [in_compute_type(component, probe_inputs(component, c), given) for c in cases]
    staged = StagedGraph(model, graph.parent, block_names(part))
    agreements: list[Agreement] = []

    # The last block hands on something made of its output; the graph's outputs speak for it.
    compared = list(wanted.blocks)[:-1]

    def stage_done(case: int, number: int, carried: dict[str, Array]) -> None:
        block = staged.stages[number].block
        if block not in compared or case not in wanted.blocks[block]:
            return
        ref = wanted.blocks[block][case]
        # What is carried over and nearest to torch's is the block's output, if it is near at all:
        # the last of an encoder's projections is handed on as part of its table.
        same = [v.reshape(ref.shape) for v in carried.values()
                if v.size == ref.size and v.dtype.kind == "f"]  # fmt: skip
        found = [
            a
            for value in same
            for a in compare(component, compute, cases[case], {block: value}, {block: ref}, runner)
        ]
        nearest = max(found, key=lambda a: a.cosine if a.cosine == a.cosine else -1, default=None)
        if nearest is not None and nearest.cosine > RELATED:
            agreements.append(nearest)

    outputs = staged.run(feeds, stage_done=stage_done, progress=progress)
    for case, got, ref in zip(cases, outputs, wanted.outputs, strict=True):
        agreements += compare(component, compute, case, got, ref, runner)
    return agreements


def audit_ranges(
    part: Part, graph: Path, cases: Sequence[ProbeCase], *, progress: Share = lambda share: None
) -> RangeAudit:
    """The largest magnitude of every 16-bit tensor of a graph, in a float32 run of the cases."""
    wide, tensors = widened(onnx.load(graph, load_external_data=False))
    staged = StagedGraph(with_maxima(wide, tensors), graph.parent, block_names(part))
    feeds = [probe_inputs(part.component, case) for case in cases]
    return audit(tensors, staged.run(feeds, progress=progress))


def half_agreements(
    part: Part,
    tensors: Mapping[str, StoredTensor],
    cases: Sequence[ProbeCase],
    wanted: Sequence[Mapping[str, Array]],
) -> list[Agreement]:
    """The same module in torch's own float16 arithmetic, against its float32: what float16 costs
    and whether it overflows. Nothing where torch's CPU would take hours for it."""
    parameters = sum(int(np.prod(t.shape)) for t in tensors.values())
    if parameters > SMALL_FOR_HALF and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return []
    with default_dtype("float16"):
        module = stream_weights(part.build, tensors)
        return [
            agreement
            for case, ref in zip(cases, wanted, strict=True)
            for agreement in compare(
                part.component,
                "float16",
                case,
                _outputs(part.component, module, case, "float16"),
                dict(ref),
                f"torch {torch.__version__} float16",
            )
        ]
