"""`gentron-export`: a checkpoint or preset becomes a bundle, or nothing at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

import gentron
from gentron.agreement import compare, require
from gentron.bundle import (
    MANIFEST,
    NULL_TEXT,
    REPORT,
    FileEntry,
    Manifest,
    null_text_names,
    sha256_file,
    tokenizer_file,
)
from gentron.contract import text_encoder_name
from gentron.errors import OutputError, RequestError
from gentron.export.components import TRANSFORMER, VAE, Part, parts
from gentron.export.link import WeightMap
from gentron.export.parity import load_reference, reference_outputs, run_graph
from gentron.export.source import Origin, from_checkpoint, from_preset
from gentron.export.stand_in import padded_tokenizer
from gentron.export.storage import write_folder
from gentron.export.tracing import Traceable, trace
from gentron.latents import vae_factor
from gentron.presets import preset
from gentron.probe import ProbeCase, probe_sizes, save_probes
from gentron.weights import StoredTensor, stored_tensors

log = logging.getLogger(__name__)

STORAGE = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
COMPUTE = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
DEFAULT_SHARD = 5_000_000_000  # bytes; transformers' own default is of this order
# Prompts of the text encoders' probes: ordinary, empty, and longer than any encoder takes.
PROBE_PROMPTS = ("a cat reading a newspaper", "", "a very long prompt " * 40)
PROBE_SEED = 4557  # the paper's number

Progress = Callable[[str, str], None]  # (component, what is being done)


def export_bundle(
    *,
    model: str | None = None,
    checkpoint: Path | str | None = None,
    fp16: bool = False,
    fp32: bool = False,
    bf16: bool = False,
    output: Path | str | None = None,
    shard_size: int = DEFAULT_SHARD,
    progress: Progress = lambda component, doing: None,
) -> Path:
    """Exports one model; keywords are the options of `gentron-export`. Returns the bundle.

    One of `model` (a preset's name) and `checkpoint` (a folder); at most one of the precisions,
    fp16 by default. fp16 and bf16 bundles also hold float32 graphs over the same weights. Every
    graph is compared with torch before anything appears at `output` (default: ./NAME). Raises
    RequestError, BundleError, ParityError or OutputError.
    """
    if (model is None) == (checkpoint is None):
        raise RequestError("model", "give either --model PRESET or --checkpoint DIR")
    chosen = [name for name, on in (("fp16", fp16), ("fp32", fp32), ("bf16", bf16)) if on]
    if len(chosen) > 1:
        raise RequestError("precision", f"--{' and --'.join(chosen)} contradict; give one")
    precision = chosen[0] if chosen else "fp16"
    if shard_size < 1_000_000:
        raise RequestError("shard_size", f"must be at least 1000000 bytes, got {shard_size}")
    origin = (
        from_preset(preset(model)) if model is not None else from_checkpoint(Path(str(checkpoint)))
    )
    target = Path(output) if output else Path(origin.name)
    _check_target(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        _Writer(origin, precision, partial, shard_size, progress).write()
        if target.is_dir():
            target.rmdir()  # empty, as checked; os.replace wants it gone on some systems
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder; create it first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: exists and is not empty; remove it, or choose another -o")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target.parent}: not writable; choose another -o")


class _Writer:
    """Fills one empty folder."""

    def __init__(
        self, origin: Origin, precision: str, folder: Path, shard_size: int, progress: Progress
    ):
        self.origin, self.folder, self.progress = origin, folder, progress
        self.source, self.shard_size = origin.source, shard_size
        self.precisions = (precision,) if precision == "fp32" else (precision, "fp32")
        self.storage = STORAGE[precision]
        self.factor = vae_factor(self.source.vae)
        self.report: list[dict[str, Any]] = []

    def write(self) -> None:
        self._write_configs()
        self._write_weights()
        self._write_tokenizers()
        graphs = {name: self._export(part) for name, part in parts(self.source).items()}
        self._write_manifest(graphs)
        text = json.dumps({"exported_by": _versions(), "parity": self.report}, indent=1)
        (self.folder / REPORT).write_text(text + "\n", "utf-8")

    def _write_configs(self) -> None:
        source = self.source
        kinds = {"clip": "CLIPTextModel", "t5": "T5EncoderModel", "bert": "BertModel"}
        index: dict[str, Any] = {"_class_name": "GenTronPipeline"}
        for i, (text, values) in enumerate(zip(source.config.text, source.encoders, strict=True)):
            name = text_encoder_name(i)
            self._json(f"{name}/config.json", {**values, "architectures": [kinds[text.family]]})
            index[name] = ["transformers", kinds[text.family]]
            index[tokenizer_file(i).parent.name] = ["transformers", "PreTrainedTokenizerFast"]
        index |= {
            "transformer": ["gentron", "GenTron"],
            "vae": ["diffusers", source.vae["_class_name"]],
            "scheduler": ["diffusers", source.scheduler["_class_name"]],
        }
        self._json("model_index.json", index)
        config = {"_class_name": "GenTron", **source.config.to_dict()}
        self._json("transformer/config.json", config)
        self._json("vae/config.json", source.vae)
        self._json("scheduler/scheduler_config.json", source.scheduler)

    def _write_weights(self) -> None:
        folders = [text_encoder_name(i) for i in range(len(self.source.encoders))]
        for folder in (*folders, TRANSFORMER, VAE):
            self.progress(folder, "weights")
            stem = "model" if folder in folders else "diffusion_pytorch_model"
            tensors = self.origin.tensors(folder, self.storage)
            write_folder(self.folder / folder, stem, tensors, self.shard_size)

    def _write_tokenizers(self) -> None:
        for i, text in enumerate(self.origin.tokenizers):
            file = self.folder / tokenizer_file(i)
            file.parent.mkdir()
            ready = padded_tokenizer(text, self.source.config.text[i], self.source.encoders[i])
            file.write_text(ready + "\n", "utf-8")

    def _export(self, part: Part) -> tuple[str, ...]:
        component = part.component
        weights = self._weights(part)
        with torch.device("cpu"):
            module = load_reference(part.build(), weights.tensors)
        cases = self._cases(part)
        self.progress(component.name, "reference")
        wanted = [reference_outputs(component, module, case) for case in cases]
        if component.name.startswith("text_encoder"):
            self._keep_null(component.name, cases, wanted)
        del module
        for precision in self.precisions:
            compute, graph = COMPUTE[precision], self.folder / component.graph_file(precision)
            self.progress(component.name, f"{precision}: tracing")
            started = time.perf_counter()
            model = trace(Traceable(component, part.build, part.side_unit), compute, weights)
            ir.save(model, graph)
            onnx.checker.check_model(str(graph))
            seconds = time.perf_counter() - started
            self.progress(component.name, f"{precision}: parity")
            outputs, runner = run_graph(component, graph, compute, cases, self.factor)
            agreements = [
                agreement
                for case, got, reference in zip(cases, outputs, wanted, strict=True)
                for agreement in compare(component, compute, case, got, reference, runner)
            ]
            self.report += [{**a.to_dict(), "trace_seconds": round(seconds, 2)} for a in agreements]
            require(agreements)
        save_probes(self.folder / _probe_file(component.name), cases, wanted)
        return self.precisions

    def _weights(self, part: Part) -> WeightMap:
        """Stored tensors under the traced module's parameter names, tied ones under each."""
        folder = self.folder / part.component.folder
        stored = stored_tensors(folder)
        with torch.device("meta"):
            module = part.build()
        by_identity: dict[int, str] = {}
        named: dict[str, StoredTensor] = {}
        values = [*module.named_parameters(remove_duplicate=False)]
        persistent = module.state_dict().keys()
        values += [(n, b) for n, b in module.named_buffers() if n in persistent]
        for name, value in values:
            first = by_identity.setdefault(id(value), part.stored_name(name))
            named[name] = stored[first]
        return WeightMap(named, folder)

    def _cases(self, part: Part) -> list[ProbeCase]:
        sizes = probe_sizes(part.component, self.source.config)
        if not part.component.name.startswith("text_encoder"):
            return [ProbeCase(PROBE_SEED + i, size) for i, size in enumerate(sizes)]
        names = [text_encoder_name(i) for i in range(len(self.source.encoders))]
        file = self.folder / tokenizer_file(names.index(part.component.name))
        encoded = Tokenizer.from_file(str(file)).encode_batch(list(PROBE_PROMPTS))
        rows = tuple((tuple(e.ids), tuple(e.attention_mask)) for e in encoded)
        return [
            ProbeCase(PROBE_SEED, {"U": len(chosen)}, tuple(r[0] for r in chosen),
                      tuple(r[1] for r in chosen))
            for chosen in (rows, rows[1:2])
        ]  # fmt: skip

    def _keep_null(
        self, name: str, cases: list[ProbeCase], wanted: list[dict[str, np.ndarray[Any, Any]]]
    ) -> None:
        """Embeddings of the empty prompt, which the second probe case holds alone."""
        file = self.folder / NULL_TEXT
        names = [text_encoder_name(i) for i in range(len(self.source.encoders))]
        hidden, mask = null_text_names(len(names))[names.index(name)]
        values: dict[str, np.ndarray[Any, Any]] = {}
        if file.exists():
            values = load_file(file)
        values[hidden] = wanted[1]["hidden"][0].copy()
        values[mask] = np.asarray(cases[1].token_mask[0], np.int64)
        if "pooled" in wanted[1]:
            values["pooled"] = wanted[1]["pooled"][0].copy()
        file.write_bytes(save(values))

    def _write_manifest(self, graphs: dict[str, tuple[str, ...]]) -> None:
        origin = self.origin
        for extra in origin.extras:
            copy = shutil.copytree if extra.is_dir() else shutil.copyfile
            copy(extra, self.folder / extra.name)
        components = self.source.components
        manifest = Manifest(
            name=origin.name,
            weights=origin.weights,
            storage=self.storage,
            precisions=graphs,
            defaults=origin.defaults,
            provenance=origin.provenance,
            licences=origin.licences,
            files=dict(self._files()),
            contract={name: component.to_dict() for name, component in components.items()},
            probes={name: _probe_file(name) for name in components},
        )
        (self.folder / MANIFEST).write_text(manifest.to_json(), "utf-8")

    def _files(self) -> Iterator[tuple[str, FileEntry]]:
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                name = file.relative_to(self.folder).as_posix()
                yield name, FileEntry(sha256_file(file), file.stat().st_size)

    def _json(self, name: str, values: dict[str, Any]) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _probe_file(component: str) -> str:
    return f"probes/{component}.safetensors"


def _versions() -> dict[str, str]:
    """What decides how a graph looks; in the report, so that the bundle stays reproducible."""
    return {"gentron": gentron.__version__, "torch": torch.__version__, "onnx": onnx.__version__}
