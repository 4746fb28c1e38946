"""`gentron-export`: a checkpoint or preset becomes a bundle, whole or not at all."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxscript
import torch
import transformers
from safetensors.numpy import load_file, save

import gentron
from gentron.bundle import MANIFEST, NULL_TEXT, REPORT, FileEntry, Manifest, tokenizer_file
from gentron.config import ModelSpec
from gentron.contract import text_encoder_name
from gentron.digests import remember
from gentron.errors import BundleError, OutputError, RequestError
from gentron.export.component import (
    Exported,
    Progress,
    export_component,
    null_text_file,
    probe_file,
)
from gentron.export.components import Part, parts
from gentron.export.isolate import export_isolated
from gentron.export.plan import ExportPlan, make_plan
from gentron.export.source import OWN_PIPELINE, Origin, from_checkpoint, from_preset
from gentron.export.stand_in import padded_tokenizer
from gentron.export.storage import TensorSource, write_folder
from gentron.export.temporal import with_temporal_layers
from gentron.export.workspace import Workspace
from gentron.presets import preset

log = logging.getLogger(__name__)

STORAGE = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
DEFAULT_SHARD = 5_000_000_000  # bytes; transformers' own default is of this order
# Models that store more than this are exported in one process for each component.
ISOLATED = 1_000_000_000  # bytes


def export_bundle(
    *,
    model: str | ModelSpec | None = None,
    checkpoint: Path | str | None = None,
    loras: Sequence[str] = (),
    video: bool = False,
    fp16: bool = False,
    fp32: bool = False,
    bf16: bool = False,
    output: Path | str | None = None,
    only: Sequence[str] = (),
    resume: bool = False,
    shard_size: int = DEFAULT_SHARD,
    isolate: bool | None = None,
    found: Callable[[str], None] = lambda line: None,
    planned: Callable[[ExportPlan], None] = lambda plan: None,
    progress: Progress = lambda component, doing, share: None,
) -> Path:
    """Exports one model; keywords are the options of `gentron-export`. Returns the bundle.

    One of `model` (a preset, by name or itself) and `checkpoint` (a folder), into which `loras`
    (FILE or FILE:SCALE) are merged and to which `video` adds untrained temporal layers; at most one
    of the precisions, fp16 by default. fp16 and bf16 bundles also hold float32 graphs over the same
    weights. Every graph is compared with torch before anything appears at `output` (default:
    ./NAME). `only` exports some components; the rest of the bundle is left out. What an interrupted
    export has finished stays in a hidden folder beside the output, and `resume` goes on from there.
    `isolate` gives every component a process of its own (default: if the model is large).
    `found` is told what a foreign checkpoint is, what of it is dropped and on what terms it may be
    used, a line at a time; `planned`, disk and time before anything is written. Raises
    RequestError, BundleError, ParityError, ResourceError or OutputError.
    """
    if (model is None) == (checkpoint is None):
        raise RequestError("model", "give either --model PRESET or --checkpoint DIR")
    chosen = [name for name, on in (("fp16", fp16), ("fp32", fp32), ("bf16", bf16)) if on]
    if len(chosen) > 1:
        raise RequestError("precision", f"--{' and --'.join(chosen)} contradict; give one")
    precision = chosen[0] if chosen else "fp16"
    if shard_size < 1_000_000:
        raise RequestError("shard_size", f"must be at least 1000000 bytes, got {shard_size}")
    if model is not None and (loras or video):
        field, advice = ("lora", "--checkpoint") if loras else ("video", f"--model {model}-video")
        raise RequestError(field, f"a preset has random weights; give {advice} instead")
    origin = (
        from_preset(model if isinstance(model, ModelSpec) else preset(model))
        if model is not None
        else from_checkpoint(Path(str(checkpoint)), loras)
    )
    if video:
        origin = with_temporal_layers(origin)
    for line in origin.notes:
        found(line)
    selected = _select(origin, only)
    settings = {
        "source": origin.fingerprint,
        "precision": precision,
        "components": list(selected),
        "shard_size": shard_size,
        "versions": _versions(),
    }
    target = Path(output) if output else Path(origin.name)
    try:
        workspace = Workspace(target, settings, resume=resume)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        writer = _Writer(origin, selected, precision, workspace, shard_size, progress)
        plan = writer.plan()
        planned(plan)
        plan.require_disk()
        files = writer.write(isolate)
        workspace.publish()
    except OSError as error:
        kept = workspace.abandon()
        advice = "free some space" if error.errno == errno.ENOSPC else "correct that"
        raise OutputError(
            f"{target}: cannot be written: {error.strerror or error}; {advice}, then repeat the "
            f"command{' with --resume' if kept else ''}"
        ) from error
    except BundleError:
        workspace.abandon(keep=False)  # another checkpoint is needed, and nothing of this one
        raise
    except BaseException:
        if workspace.abandon():
            log.warning("what is finished stays in %s; --resume goes on", workspace.folder)
        raise
    remember({target / name: entry.sha256 for name, entry in files.items()})
    return target


def _select(origin: Origin, only: Sequence[str]) -> dict[str, Part]:
    available = parts(origin.source)
    if unknown := [name for name in only if name not in available]:
        raise RequestError(
            "only", f"no component {unknown[0]!r}; this model has {', '.join(available)}"
        )
    return {name: part for name, part in available.items() if not only or name in only}


class _Writer:
    """Fills one workspace."""

    def __init__(
        self,
        origin: Origin,
        selected: dict[str, Part],
        precision: str,
        workspace: Workspace,
        shard_size: int,
        progress: Progress,
    ):
        self.origin, self.parts, self.workspace = origin, selected, workspace
        self.folder, self.progress = workspace.folder, progress
        self.source, self.shard_size = origin.source, shard_size
        self.precisions = (precision,) if precision == "fp32" else (precision, "fp32")
        self.storage = STORAGE[precision]
        self.weights = self._chosen_weights()

    def plan(self) -> ExportPlan:
        written = sum(
            file.stat().st_size
            for file in self.folder.rglob("*.safetensors")
            if self.workspace.digest(file) is not None
        )
        return make_plan(
            list(self.parts.values()),
            self.source.config,
            [tensor for tensors in self.weights.values() for tensor in tensors],
            self.precisions,
            self.workspace.target,
            written=written,
            random=self.origin.weights == "random",
        )

    def write(self, isolate: bool | None) -> dict[str, FileEntry]:
        """Everything; returns the files that the manifest lists."""
        stored = sum(t.length for tensors in self.weights.values() for t in tensors)
        if isolate is None:
            isolate = stored > ISOLATED
        self._write_configs()
        self._write_weights()
        self._write_tokenizers()
        exported = [self._export(name, isolate) for name in self.parts]
        self._write_null_text()
        files = self._write_manifest(exported)
        text = json.dumps({"exported_by": _versions(), "components": [vars(e) for e in exported]},
                          indent=1)  # fmt: skip
        (self.folder / REPORT).write_text(text + "\n", "utf-8")
        return files

    def _encoders(self) -> list[str]:
        return [text_encoder_name(i) for i in range(len(self.source.encoders))]

    def _chosen_weights(self) -> dict[str, list[TensorSource]]:
        """By folder: the tensors that the chosen components read."""
        folders: dict[str, tuple[str, ...]] = {}
        for part in self.parts.values():
            folder = part.component.folder
            folders[folder] = (*folders.get(folder, ()), part.prefixes[1])
        return {
            folder: self.origin.tensors(folder, self.storage, prefixes)
            for folder, prefixes in folders.items()
        }

    def _write_configs(self) -> None:
        source = self.source
        kinds = {"clip": "CLIPTextModel", "t5": "T5EncoderModel", "bert": "BertModel"}
        index: dict[str, Any] = {"_class_name": OWN_PIPELINE}
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
        for folder, tensors in self.weights.items():
            stem = "model" if folder in self._encoders() else "diffusion_pytorch_model"
            self.progress(f"{folder}/", "weights", 0.0)
            write_folder(
                self.folder / folder,
                stem,
                tensors,
                self.shard_size,
                journal=self.workspace,
                progress=lambda share, folder=folder: self.progress(  # type: ignore[misc]
                    f"{folder}/", "weights", share
                ),
            )
            self.progress(f"{folder}/", "weights", 1.0)

    def _write_tokenizers(self) -> None:
        for i, (name, text) in enumerate(
            zip(self._encoders(), self.origin.tokenizers, strict=True)
        ):
            if name in self.parts:
                file = self.folder / tokenizer_file(i)
                file.parent.mkdir(exist_ok=True)
                config, encoder = self.source.config.text[i], self.source.encoders[i]
                file.write_text(padded_tokenizer(text, config, encoder) + "\n", "utf-8")

    def _export(self, name: str, isolate: bool) -> Exported:
        if finished := self.workspace.exported(name):
            self.progress(name, "finished before", 1.0)
            return finished
        notes = self.workspace.notes
        if isolate:
            exported = export_isolated(self.folder, notes, name, self.precisions, self.progress)
        else:
            exported = export_component(
                self.folder, notes, self.source, name, self.precisions, progress=self.progress
            )
        self.workspace.keep(exported)
        self.progress(name, "finished", 1.0)
        return exported

    def _write_null_text(self) -> None:
        """Embeddings of the empty prompt by all encoders that were exported."""
        values: dict[str, np.ndarray[Any, Any]] = {}
        for name in self._encoders():
            if name in self.parts:
                values |= load_file(self.workspace.notes / null_text_file(name))
        if values:
            (self.folder / NULL_TEXT).write_bytes(save(values))

    def _write_manifest(self, exported: Sequence[Exported]) -> dict[str, FileEntry]:
        origin = self.origin
        for name, extra in origin.extras.items():
            target = self.folder / name
            if extra.is_dir():
                shutil.copytree(extra, target, dirs_exist_ok=True)
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(extra, target)
        components = self.source.components
        manifest = Manifest(
            name=origin.name,
            weights=origin.weights,
            storage=self.storage,
            precisions={e.component: e.precisions for e in exported},
            defaults=origin.defaults,
            provenance=origin.provenance,
            licences=origin.licences,
            files=self.workspace.files(),
            contract={name: component.to_dict() for name, component in components.items()},
            probes={e.component: probe_file(e.component) for e in exported},
        )
        (self.folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
        return manifest.files

    def _json(self, name: str, values: dict[str, Any]) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _versions() -> dict[str, str]:
    """What decides how a graph looks; in the report, so that the bundle stays reproducible."""
    modules = (gentron, torch, transformers, diffusers, onnx, onnxscript)
    return {module.__name__: module.__version__ for module in modules}
