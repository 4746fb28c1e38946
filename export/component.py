"""One component, from its stored weights to checked graphs and golden probes."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer
from torch import nn

from gentron.agreement import Agreement, require
from gentron.bundle import null_text_names, tokenizer_file
from gentron.contract import PRECISIONS, text_encoder_name
from gentron.export.components import Part, Source, parts
from gentron.export.facts import graph_facts
from gentron.export.link import WeightMap
from gentron.export.parity import audit_ranges, check_graph, half_agreements, reference
from gentron.export.ranges import RangeAudit
from gentron.export.tracing import Traceable, trace
from gentron.latents import vae_factor
from gentron.probe import ProbeCase, probe_sizes, save_probes
from gentron.weights import StoredTensor, stored_tensors

Array = npt.NDArray[Any]
Progress = Callable[[str, str, float], None]  # (component, what is being done, share done)

# Components whose weights take more than this in float32 are run and compared block by block.
WHOLE = 1_000_000_000  # bytes
# Many autoencoders leave float16 (SDXL's does), and the decoder runs once, in float32 by default:
# where it overflows, the bundle has its float32 graph alone.
DECODER = "vae_decoder"
# Prompts of the text encoders' probes: ordinary, empty, and longer than any encoder takes.
PROBE_PROMPTS = ("a cat reading a newspaper", "", "a very long prompt " * 40)
PROBE_SEED = 4557  # the paper's number


@dataclass(frozen=True)
class Exported:
    """What is known of a component once its files are there."""

    component: str
    precisions: tuple[str, ...]
    parity: tuple[dict[str, Any], ...]
    ranges: dict[str, Any] | None
    graphs: tuple[dict[str, Any], ...]
    seconds: dict[str, float]  # trace, parity
    peak_bytes: dict[str, int]  # of the process: trace, parity

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Exported:
        values = json.loads(text)
        for name in ("precisions", "parity", "graphs"):
            values[name] = tuple(values[name])
        return cls(**values)


def probe_file(component: str) -> str:
    return f"probes/{component}.safetensors"


def null_text_file(component: str) -> str:
    return f"null_text.{component}.safetensors"


def export_component(
    folder: Path,
    notes: Path,
    source: Source,
    name: str,
    precisions: Sequence[str],
    *,
    progress: Progress = lambda component, doing, share: None,
    whole: int = WHOLE,
) -> Exported:
    """Traces, links and checks one component of a bundle whose weights already lie in `folder`.

    Writes its graphs and probes there, and into `notes` the empty prompt's embeddings if it is a
    text encoder. Raises ParityError where a graph disagrees with torch or leaves float16's range;
    a decoder that does so has no float16 graph instead.
    """
    return _Export(folder, notes, source, parts(source)[name], progress, whole).run(precisions)


class _Export:
    def __init__(
        self,
        folder: Path,
        notes: Path,
        source: Source,
        part: Part,
        progress: Progress,
        whole: int,
    ):
        self.folder, self.notes, self.source, self.part = folder, notes, source, part
        self.name = part.component.name
        self.factor = vae_factor(source.vae)
        self._progress, self._whole = progress, whole
        self._doing, self._done, self._activities = "", 0, 1

    def run(self, precisions: Sequence[str]) -> Exported:
        self._activities = 2 * len(precisions) + 3
        weights = stored_weights(self.folder, self.part)
        started = time.perf_counter()
        graphs = {precision: self._trace(precision, weights) for precision in precisions}
        traced, peak = time.perf_counter(), peak_bytes()
        staged = 4 * sum(math.prod(t.shape) for t in weights.tensors.values()) > self._whole
        cases = self._cases()
        self._begin("reference")
        # A decoder's blocks hand over permuted layouts, so only its pixels are compared.
        keep_blocks = staged and self.name != DECODER
        wanted = reference(self.part, weights.tensors, cases, keep_blocks=keep_blocks)
        agreements: list[Agreement] = []
        for precision, graph in graphs.items():
            self._begin(f"{precision}: parity")
            agreements += check_graph(
                self.part, graph, PRECISIONS[precision], cases, wanted, self.factor,
                staged=staged, progress=self._inside,
            )  # fmt: skip
        self._begin("range audit")
        ranges: RangeAudit | None = None
        if "fp16" in graphs:
            ranges = audit_ranges(self.part, graphs["fp16"], cases, progress=self._inside)
            if self.name == DECODER and not ranges.passed and "fp32" in graphs:
                graphs.pop("fp16").unlink()
                agreements = [a for a in agreements if a.compute != PRECISIONS["fp16"]]
                self._inside(1.0, f"float16 left out: reaches {ranges.highest[0].largest:.3g}")
            else:
                ranges.require(self.name)
        if "fp16" in graphs:
            self._begin("parity with float16 arithmetic")
            agreements += half_agreements(self.part, weights.tensors, cases, wanted.outputs)
        require(agreements)
        save_probes(self.folder / probe_file(self.name), cases, wanted.outputs)
        if self.name.startswith("text_encoder"):
            self._keep_null(cases, wanted.outputs)
        return Exported(
            component=self.name,
            precisions=tuple(graphs),
            parity=tuple(a.to_dict() for a in agreements),
            ranges=ranges.to_dict() if ranges else None,
            graphs=tuple(graph_facts(graph) for graph in graphs.values()),
            seconds={
                "trace": round(traced - started, 1),
                "parity": round(time.perf_counter() - traced, 1),
            },
            peak_bytes={"trace": peak, "parity": peak_bytes()},
        )

    def _begin(self, doing: str) -> None:
        """The next of the component's activities; each counts the same in the progress bar."""
        from gentron.engines.host_memory import give_back

        give_back()
        self._doing = doing
        self._inside(0.0)
        self._done += 1

    def _inside(self, share: float, doing: str = "") -> None:
        done = self._done - (1 if share else 0)
        self._progress(self.name, doing or self._doing, (done + share) / self._activities)

    def _trace(self, precision: str, weights: WeightMap) -> Path:
        component = self.part.component
        self._begin(f"{precision}: tracing")
        graph = self.folder / component.graph_file(precision)
        traceable = Traceable(component, self.part.build, self.part.side_unit)
        ir.save(trace(traceable, PRECISIONS[precision], weights), graph)
        onnx.checker.check_model(str(graph))
        return graph

    def _cases(self) -> list[ProbeCase]:
        sizes = probe_sizes(self.part.component, self.source.config)
        if not self.name.startswith("text_encoder"):
            return [ProbeCase(PROBE_SEED + i, size) for i, size in enumerate(sizes)]
        file = self.folder / tokenizer_file(self._encoders().index(self.name))
        encoded = Tokenizer.from_file(str(file)).encode_batch(list(PROBE_PROMPTS))
        rows = tuple((tuple(e.ids), tuple(e.attention_mask)) for e in encoded)
        return [
            ProbeCase(PROBE_SEED, {"U": len(chosen)}, tuple(r[0] for r in chosen),
                      tuple(r[1] for r in chosen))
            for chosen in (rows, rows[1:2])
        ]  # fmt: skip

    def _encoders(self) -> list[str]:
        return [text_encoder_name(i) for i in range(len(self.source.encoders))]

    def _keep_null(self, cases: list[ProbeCase], wanted: list[dict[str, Array]]) -> None:
        """Embeddings of the empty prompt, which the second probe case holds alone."""
        names = self._encoders()
        hidden, mask = null_text_names(len(names))[names.index(self.name)]
        values = {
            hidden: wanted[1]["hidden"][0].copy(),
            mask: np.asarray(cases[1].token_mask[0], np.int64),
        }
        if "pooled" in wanted[1]:
            values["pooled"] = wanted[1]["pooled"][0].copy()
        (self.notes / null_text_file(self.name)).write_bytes(save(values))


def stored_weights(bundle: Path, part: Part) -> WeightMap:
    """Stored tensors under the traced module's parameter names, tied ones under each."""
    folder = bundle / part.component.folder
    stored = stored_tensors(folder)
    with torch.device("meta"):
        module = part.build()
    by_identity: dict[int, str] = {}
    named: dict[str, StoredTensor] = {}
    for name, value in stored_values(module):
        first = by_identity.setdefault(id(value), part.stored_name(name))
        named[name] = stored[first]
    return WeightMap(named, folder)


def stored_values(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, tied ones under every name, and persistent buffers."""
    values: list[tuple[str, torch.Tensor]] = [*module.named_parameters(remove_duplicate=False)]
    persistent = module.state_dict().keys()
    return values + [(n, b) for n, b in module.named_buffers() if n in persistent]


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    # Linux hands getrusage's figure on to new processes, so a worker would repeat its parent's.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
