"""A graph run block by block gives what the whole gives, and says which block is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gentron.bundle import Bundle
from gentron.export.component import stored_weights
from gentron.export.components import Part, parts
from gentron.export.parity import block_names, check_graph, reference, run_whole
from gentron.export.source import read_source
from gentron.export.staged import StagedGraph
from gentron.export.streamed import blocks, stream_weights
from gentron.probe import ProbeCase, in_compute_type, load_probes, probe_inputs
from gentron.weights import StoredTensor

COMPONENTS = ("text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser",
              "vae_decoder")  # fmt: skip
DEPTH = {"text_encoder": 2, "text_encoder_2": 2, "text_projection": 3, "conditioner": 3,
         "denoiser": 3}  # fmt: skip


def part_of(folder: Path, name: str) -> Part:
    return parts(read_source(folder))[name]


def stored(folder: Path, part: Part) -> Mapping[str, StoredTensor]:
    return stored_weights(folder, part).tensors


def cases_of(folder: Path, name: str) -> list[ProbeCase]:
    bundle = Bundle.open(folder)
    return [case for case, _ in load_probes(folder / bundle.manifest.probes[name])]


@pytest.mark.parametrize("compute", ["float32", "float16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_stages_together_give_what_the_whole_graph_gives(tiny_video_bundle, name, compute):
    part = part_of(tiny_video_bundle, name)
    precision = {"float32": "fp32", "float16": "fp16"}[compute]
    graph = tiny_video_bundle / part.component.graph_file(precision)
    cases = cases_of(tiny_video_bundle, name)
    model = onnx.load(graph, load_external_data=False)
    staged = StagedGraph(model, graph.parent, block_names(part))
    feeds = [in_compute_type(part.component, probe_inputs(part.component, c), compute)
             for c in cases]  # fmt: skip
    wholes, _ = run_whole(part.component, graph, compute, cases, 2)
    limit = {"float32": 2e-6, "float16": 8e-3}[compute]  # fused or not: order and roundings
    for got, whole in zip(staged.run(feeds), wholes, strict=True):
        assert got.keys() == whole.keys()
        for output in whole:
            a, b = got[output].astype(np.float64), whole[output].astype(np.float64)
            assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max()), output


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_node_is_in_one_stage_and_no_stage_holds_two_blocks(tiny_video_bundle, name):
    part = part_of(tiny_video_bundle, name)
    graph = tiny_video_bundle / part.component.graph_file("fp32")
    model = onnx.load(graph, load_external_data=False)
    names = block_names(part)
    staged = StagedGraph(model, graph.parent, names)
    made = [output for stage in staged.stages for node in stage.nodes for output in node.output]
    assert len(made) == len(set(made))
    for stage in staged.stages:
        read = {tensor.name for tensor in staged.proto(stage).graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL}  # fmt: skip
        held = {block for block in names if any(w.startswith(f"{block}.") for w in read)}
        assert held <= {stage.block}, stage.block
    reached = {stage.block for stage in staged.stages} - {""}
    assert reached <= set(names)
    assert len(reached) == DEPTH.get(name, len(reached))


@pytest.mark.parametrize("name", list(DEPTH))
def test_torch_is_compared_after_every_block(tiny_video_bundle, name):
    part = part_of(tiny_video_bundle, name)
    cases = cases_of(tiny_video_bundle, name)
    wanted = reference(part, stored(tiny_video_bundle, part), cases, keep_blocks=True)
    graph = tiny_video_bundle / part.component.graph_file("fp32")
    found = check_graph(part, graph, "float32", cases, wanted, 2, staged=True)
    compared = {a.output for a in found if a.output in wanted.blocks}
    # The outputs speak for the last block, and for the last projection of each encoder.
    assert len(compared) == (1 if name == "text_projection" else DEPTH[name] - 1)
    assert all(a.passed for a in found), [a for a in found if not a.passed]


def test_a_poisoned_block_is_the_first_that_disagrees(tiny_video_bundle, tmp_path):
    import shutil

    part = part_of(tiny_video_bundle, "denoiser")
    cases = cases_of(tiny_video_bundle, "denoiser")
    healthy = stored(tiny_video_bundle, part)
    wanted = reference(part, healthy, cases, keep_blocks=True)
    copy = Path(shutil.copytree(tiny_video_bundle, tmp_path / "bundle"))
    poisoned = stored(copy, part)["denoiser.blocks.1.mlp.up.weight"]
    with poisoned.file.open("r+b") as stream:
        stream.seek(poisoned.offset)
        stream.write(np.full(64, 0.5, np.float16).tobytes())
    graph = copy / part.component.graph_file("fp32")
    found = check_graph(part, graph, "float32", cases, wanted, 2, staged=True)
    wrong = {a.output for a in found if not a.passed}
    assert "denoiser.blocks.0" not in wrong
    assert {"denoiser.blocks.1", "next_state"} <= wrong


@pytest.mark.parametrize("name", COMPONENTS)
def test_streamed_weights_give_the_same_bits_and_are_gone_afterwards(tiny_video_bundle, name):
    part = part_of(tiny_video_bundle, name)
    tensors = stored(tiny_video_bundle, part)
    cases = cases_of(tiny_video_bundle, name)
    whole = part.build()
    state = {n: torch.from_numpy(np.fromfile(t.file, np.uint8, t.length, offset=t.offset))
             .view({"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}[t.dtype])
             .reshape(t.shape) for n, t in tensors.items()}  # fmt: skip
    whole.load_state_dict(state, strict=False)
    whole.eval()
    streamed = stream_weights(part.build, tensors)
    for case in cases:
        inputs = [torch.from_numpy(v) for v in probe_inputs(part.component, case).values()]
        with torch.inference_mode():
            a, b = whole(*inputs), streamed(*inputs)
        for x, y in zip(a if isinstance(a, tuple) else (a,),
                        b if isinstance(b, tuple) else (b,), strict=True):  # fmt: skip
            assert torch.equal(x, y)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_only_one_block_is_resident_at_a_time(tiny_video_bundle):
    part = part_of(tiny_video_bundle, "denoiser")
    resident: list[set[str]] = []
    streamed = stream_weights(part.build, stored(tiny_video_bundle, part))
    listed = dict(blocks(streamed))

    def look(*_: object) -> None:
        resident.append({n for n, block in listed.items()
                         if any(not p.is_meta for p in block.parameters())})  # fmt: skip

    for block in listed.values():
        block.register_forward_pre_hook(look)
    case = cases_of(tiny_video_bundle, "denoiser")[-1]
    inputs = [torch.from_numpy(v) for v in probe_inputs(part.component, case).values()]
    with torch.inference_mode():
        streamed(*inputs)
    assert resident == [{name} for name in listed]
    assert len(resident) == 3
