"""Runs an exported graph a block at a time, so that a model larger than memory can be checked.

The nodes of a graph stand in the order of the module's forward pass. They are cut where the
weights of another block begin; every stage is a session of its own, and what later stages read is
carried over in numpy arrays. Nothing is left out, so the outputs are those of the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
StageDone = Callable[[int, int, dict[str, Array]], None]  # (number of the case, stage, carried)


@dataclass
class Stage:
    """Consecutive nodes, with the weights that only they read."""

    block: str  # the block whose weights it holds; "" for what lies outside of blocks
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)  # from the feeds or from earlier stages
    outputs: list[str] = field(default_factory=list)  # for later stages, or of the graph


class StagedGraph:
    """An ONNX model, cut into stages where the weights of another of `blocks` begin (names that
    weights start with). `model` has its weights as external data in `folder`."""

    def __init__(self, model: onnx.ModelProto, folder: Path, blocks: Sequence[str]):
        self.model, self.folder, self._blocks = model, folder, blocks
        graph = model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {
            value.name: value for value in (*graph.input, *graph.output, *graph.value_info)
        }
        self._outputs = [value.name for value in graph.output]
        self._prepared = self._weight_only(graph.node)
        self.stages = self._cut([n for n in graph.node if not set(n.output) & set(self._prepared)])
        self._connect()

    def _weight_only(self, nodes: Sequence[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
        """Casts and transposes of weights: they belong to the stage that reads them."""
        found: dict[str, onnx.NodeProto] = {}
        for node in nodes:
            ready = all(name in self._weights or name in found for name in node.input)
            if node.op_type in ("Cast", "Transpose") and ready:
                found |= dict.fromkeys(node.output, node)
        return found

    def _cut(self, nodes: Sequence[onnx.NodeProto]) -> list[Stage]:
        stages = [Stage("")]
        for node in nodes:
            read = {self._block(w) for w in self._reads(node) if self._is_stored(w)}
            if read and stages[-1].block not in read:
                if stages[-1].nodes:
                    stages.append(Stage(""))
                stages[-1].block = min(read)
            stages[-1].nodes.append(node)
        return stages

    def _block(self, weight: str) -> str:
        return next((name for name in self._blocks if weight.startswith(f"{name}.")), "")

    def _is_stored(self, name: str) -> bool:
        return bool(self._weights[name].data_location == onnx.TensorProto.EXTERNAL)

    def _reads(self, node: onnx.NodeProto) -> Iterator[str]:
        """Weights a node reads, through weight-only nodes too."""
        for name in node.input:
            if name in self._weights:
                yield name
            elif name in self._prepared:
                yield from self._reads(self._prepared[name])

    def _connect(self) -> None:
        made: set[str] = set()
        graph_inputs = {value.name for value in self.model.graph.input}
        for stage in self.stages:
            inside = {name for node in stage.nodes for name in node.output}
            read = dict.fromkeys(n for node in stage.nodes for n in node.input)
            stage.inputs = [n for n in read if n in graph_inputs or n in made]
            made |= inside
        wanted = set(self._outputs)
        for stage in reversed(self.stages):
            results = [name for node in stage.nodes for name in node.output if name]
            stage.outputs = [name for name in results if name in wanted]
            wanted |= set(stage.inputs)

    def proto(self, stage: Stage) -> onnx.ModelProto:
        """The stage as a model of its own."""
        prepared: dict[int, onnx.NodeProto] = {}
        weights: dict[str, onnx.TensorProto] = {}

        def need(name: str) -> None:
            if name in self._weights:
                weights[name] = self._weights[name]
            elif name in self._prepared:
                node = self._prepared[name]
                for read in node.input:
                    need(read)
                prepared.setdefault(id(node), node)

        for node in stage.nodes:
            for name in node.input:
                need(name)
        graph = onnx.helper.make_graph(
            [*prepared.values(), *stage.nodes],
            "stage",
            [self._typed(name) for name in stage.inputs],
            [self._typed(name) for name in stage.outputs],
            list(weights.values()),
        )
        return onnx.helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def _typed(self, name: str) -> onnx.ValueInfoProto:
        """Name and type; a shape would only repeat what the session finds by itself."""
        kind = self._types[name].type.tensor_type.elem_type
        return onnx.helper.make_tensor_value_info(name, kind, None)

    def run(
        self,
        feeds: Sequence[Mapping[str, Array]],
        *,
        stage_done: StageDone = lambda case, stage, carried: None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[dict[str, Array]]:
        """Outputs of the graph for each set of inputs; every stage is loaded once for all."""
        from gentron.engines.host_memory import give_back

        carried = [dict(feed) for feed in feeds]
        last_read = {n: i for i, stage in enumerate(self.stages) for n in stage.inputs}
        for number, stage in enumerate(self.stages):
            session = _session(self.proto(stage), self.folder)
            for case, values in enumerate(carried):
                given = {name: values[name] for name in stage.inputs}
                values |= dict(zip(stage.outputs, session.run(stage.outputs, given), strict=True))
                for name in list(values):
                    if name not in self._outputs and last_read.get(name, -1) <= number:
                        del values[name]
                stage_done(case, number, values)
            del session
            give_back()
            progress((number + 1) / len(self.stages))
        return [{name: values[name] for name in self._outputs} for values in carried]


def _session(model: onnx.ModelProto, folder: Path) -> Any:
    from gentron.engines.onnxruntime_cpu import CPU, import_onnxruntime

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Freed after every stage; an arena would keep the largest of each size for good.
    options.enable_cpu_mem_arena = False
    # Repacked weights would be a second copy, for a session that runs a few times.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    # Weights are cast and transposed one after the other as they are read; folded, all of a block's
    # would be there at once, twice, and it takes longer than to run them.
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=[CPU], disabled_optimizers=["ConstantFolding"]
    )
