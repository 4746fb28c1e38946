"""Where an export comes from: a checkpoint folder, or a preset with seeded random weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gentron.bundle import MANIFEST
from gentron.config import GenTronConfig, ModelSpec, SamplingDefaults
from gentron.contract import text_encoder_name
from gentron.errors import BundleError, RequestError
from gentron.export.components import TRANSFORMER, VAE, Source
from gentron.export.stand_in import stand_in_tokenizer
from gentron.export.storage import TYPE_NAMES, TensorSource
from gentron.model import GenTron
from gentron.model.gentron import random_values
from gentron.model.text_encoder import TextEncoder, encoder_config
from gentron.model.vae import new_vae
from gentron.presets import IMAGE_DEFAULTS
from gentron.weights import StoredTensor, stored_tensors

ABOUT = "checkpoint.json"  # name, defaults, provenance, licences of a checkpoint; optional
EXTRAS = (
    "README.md",
    "nouns.txt",
    "LICENSES",
    "pictures",
)  # copied into the bundle if they are there
OWN_PIPELINE = "GenTronPipeline"
RANDOM_SEED = 20231204  # the paper's date


@dataclass(frozen=True)
class Origin:
    """A source with its tensors, tokenizers and history."""

    name: str
    source: Source
    weights: str  # "trained" or "random"
    fingerprint: dict[str, Any]  # tells whether an interrupted export had the same source
    defaults: SamplingDefaults
    tokenizers: tuple[str, ...]  # tokenizer.json of each encoder, before padding is set up
    read: Callable[[str, str, tuple[int, ...]], Tensor]  # (folder, tensor, shape)
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: tuple[dict[str, str], ...] = ()
    extras: dict[str, Path] = field(default_factory=dict)  # by name in the bundle
    notes: tuple[str, ...] = ()  # lines about what was found, kept and dropped

    def tensors(
        self, folder: str, storage: str, prefixes: tuple[str, ...] = ("",)
    ) -> list[TensorSource]:
        """What is stored for one folder, or for the parts of it whose names begin like this;
        float32 islands of the transformer keep float32."""
        return [
            TensorSource(
                name,
                tuple(values.shape),
                _stored_type(folder, values, storage),
                partial(self.read, folder, name, tuple(values.shape)),
            )
            for name, values in expected_tensors(self.source, folder)
            if name.startswith(prefixes)
        ]


def _stored_type(folder: str, values: Tensor, storage: str) -> str:
    if not values.is_floating_point():
        return TYPE_NAMES[values.dtype]
    # The module was built in float16, so what is float32 in it is float32 by design.
    return "F32" if folder == TRANSFORMER and values.dtype == torch.float32 else storage


def expected_tensors(source: Source, folder: str) -> Iterator[tuple[str, Tensor]]:
    """Names, shapes and island types of the tensors a folder must hold, on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            module = folder_module(source, folder)
    finally:
        torch.set_default_dtype(before)
    yield from module.named_parameters()
    persistent = module.state_dict().keys()
    yield from ((name, b) for name, b in module.named_buffers() if name in persistent)


def folder_module(source: Source, folder: str) -> nn.Module:
    """The module whose parameters a folder of the checkpoint holds."""
    if folder == TRANSFORMER:
        return GenTron(source.config)
    if folder == VAE:
        return new_vae(source.vae)
    for index, values in enumerate(source.encoders):
        if folder == text_encoder_name(index):
            return TextEncoder(source.config.text[index], encoder_config(values)).model
    raise AssertionError(folder)


def from_preset(spec: ModelSpec) -> Origin:
    """Seeded random weights for every tensor, and byte-level stand-in tokenizers."""
    if not spec.encoders:
        raise BundleError(
            f"preset {spec.name!r} has weights of its own: use the packaged bundle, or train it "
            "(gentron-train emoji) and export with --checkpoint"
        )
    source = Source(spec.transformer, spec.encoders, spec.vae, spec.scheduler)

    def read(folder: str, name: str, shape: tuple[int, ...]) -> Tensor:
        seed = RANDOM_SEED + zlib.crc32(f"{folder}/{name}".encode())
        values = random_values(name, shape, seed)
        if name.endswith("SelfAttention.q.weight"):
            # T5 scales queries in their initialisation and not in attention. Without it softmax
            # is so sharp that two correct float16 evaluations differ by a fifth.
            values *= shape[0] ** -0.5 * _heads(source, folder) ** 0.5
        return values

    return Origin(
        name=spec.name,
        source=source,
        weights="random",
        fingerprint={"preset": spec.name, "seed": RANDOM_SEED, "spec": repr(source)},
        defaults=spec.defaults,
        tokenizers=tuple(stand_in_tokenizer(values) for values in spec.encoders),
        read=read,
        provenance={"preset": spec.name, "note": spec.note, "seed": RANDOM_SEED},
    )


def _heads(source: Source, folder: str) -> int:
    names = [text_encoder_name(i) for i in range(len(source.encoders))]
    return int(source.encoders[names.index(folder)]["num_heads"])


def from_checkpoint(folder: Path, loras: Sequence[str] = ()) -> Origin:
    """A folder in diffusers' pipeline layout, of ours or of PixArt's; every missing, extra or
    misshapen tensor is named. `loras` are merged into PixArt's transformer."""
    from gentron.export.pixart import PIPELINES, from_pixart

    if not (folder / "model_index.json").is_file():
        raise BundleError(
            f"{folder}: no model_index.json; --checkpoint takes a folder in diffusers' layout"
        )
    kind = _json(folder / "model_index.json").get("_class_name")
    if kind in PIPELINES:
        return from_pixart(folder, loras)
    if loras:
        raise RequestError("lora", f"{folder} is not PixArt's, and no other transformer takes one")
    if kind not in (None, OWN_PIPELINE):
        raise BundleError(
            f"{folder / 'model_index.json'}: {kind!r} is not supported; --checkpoint takes "
            f"{OWN_PIPELINE}, {' or '.join(PIPELINES)}"
        )
    source = read_source(folder)
    names = [text_encoder_name(i) for i in range(len(source.encoders))]
    stored = {name: stored_tensors(folder / name) for name in (*names, TRANSFORMER, VAE)}
    for name, tensors in stored.items():
        check_tensors(folder / name, dict(expected_tensors(source, name)), tensors)

    def read(part: str, name: str, _: tuple[int, ...]) -> Tensor:
        with safe_open(stored[part][name].file, framework="pt") as file:
            values: Tensor = file.get_tensor(name)
            return values

    # A bundle is a checkpoint too, and its manifest says the same things under the same names.
    about = next((_json(folder / f) for f in (ABOUT, MANIFEST) if (folder / f).is_file()), {})
    defaults = about.get("defaults")
    return Origin(
        name=about.get("name", folder.resolve().name),
        source=source,
        weights=about.get("weights", "trained"),
        fingerprint={
            "checkpoint": str(folder.resolve()),
            "files": sorted(
                (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
                for name in stored
                for file in {tensor.file for tensor in stored[name].values()}
            ),
        },
        defaults=SamplingDefaults(**defaults) if defaults else IMAGE_DEFAULTS,
        tokenizers=tuple(
            _text(folder / ("tokenizer" if i == 0 else f"tokenizer_{i + 1}") / "tokenizer.json")
            for i in range(len(names))
        ),
        read=read,
        provenance=about.get("provenance", {}),
        licences=tuple(about.get("licences", ())),
        extras={name: folder / name for name in EXTRAS if (folder / name).exists()},
    )


def read_source(folder: Path) -> Source:
    """The configurations of a checkpoint or bundle."""
    config = _json(folder / TRANSFORMER / "config.json")
    transformer = GenTronConfig.from_dict(
        {key: value for key, value in config.items() if not key.startswith("_")}
    )
    names = [text_encoder_name(i) for i in range(len(transformer.text))]
    return Source(
        transformer,
        tuple(_json(folder / name / "config.json") for name in names),
        _json(folder / VAE / "config.json"),
        _json(folder / "scheduler" / "scheduler_config.json"),
    )


def check_tensors(
    folder: Path, expected: dict[str, Tensor], stored: dict[str, StoredTensor]
) -> None:
    """Raises BundleError that names every tensor that is missing, extra or of another shape."""
    wrong = [f"missing: {name}" for name in sorted(set(expected) - set(stored))]
    wrong += [f"not part of this model: {name}" for name in sorted(set(stored) - set(expected))]
    wrong += [
        f"shape {list(stored[name].shape)}, not {list(values.shape)}: {name}"
        for name, values in expected.items()
        if name in stored and tuple(values.shape) != stored[name].shape
    ]
    if wrong:
        raise BundleError(
            f"{folder}: {len(wrong)} tensors are not what config.json asks for; give the folder "
            "the configuration that belongs to these weights: " + "; ".join(wrong)
        )


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(file))
    except ValueError as error:
        raise BundleError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{file}: expected a JSON object")
    return values
