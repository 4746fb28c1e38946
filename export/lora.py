"""LoRA: low-rank changes to a transformer's weights, merged when they are read.

A file names pairs (A [r, in], B [out, r]) for layers of diffusers' transformer; the merged weight
is W + scale * (alpha / r) * B A (Hu et al., arXiv 2106.09685, section 4.1). Read are what PEFT
saves (with its adapter_config.json) and what diffusers saves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gentron.bundle import sha256_file
from gentron.errors import BundleError, RequestError
from gentron.export.pipeline_folder import FLOATS, read_json
from gentron.export.streamed import read_tensor
from gentron.weights import StoredTensor, read_header

PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of diffusers, in the file's header
_PAIR = re.compile(
    r"^(?P<layer>.+)\.(?:lora_(?P<new>[AB])(?:\.default)?|lora\.(?P<old>down|up))\.weight$"
)
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
# Settings of PEFT's LoraConfig that change what is computed; value that is the same as absent.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Pair:
    down: StoredTensor  # A
    up: StoredTensor  # B
    scaling: float  # everything in front of B A


@dataclass(frozen=True)
class Lora:
    """One file and how strongly it is merged."""

    file: Path
    scale: float
    pairs: Mapping[str, Pair]  # by the weight they change, in diffusers' names

    @property
    def provenance(self) -> dict[str, Any]:
        """What the bundle's manifest says of it."""
        ranks = sorted({pair.down.shape[0] for pair in self.pairs.values()})
        return {
            "file": self.file.name,
            "sha256": sha256_file(self.file),
            "scale": self.scale,
            "layers": len(self.pairs),
            "ranks": ranks,
        }

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """`weight` as it is with this LoRA in it, float32; itself where the file does not touch it.

        The order of operations is that of PEFT's `merge`, so that float32 gives the same bits.
        """
        pair = self.pairs.get(name)
        if pair is None:
            return weight
        down, up = (read_tensor(side).float().flatten(1) for side in (pair.down, pair.up))
        return weight.float() + ((up @ down) * pair.scaling).reshape(weight.shape)


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE. Raises RequestError for a scale that is not a finite number."""
    file, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or scale.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError("lora", f"{text!r}: the scale must be a number; try {file}:1.0")
    return Path(file), value


def read_lora(file: Path, scale: float, layers: Mapping[str, tuple[int, ...]]) -> Lora:
    """Reads and checks a LoRA for a transformer whose weights are `layers` (names and shapes).

    Raises BundleError, in one line that names the tensor, for everything that is not merged
    exactly: other adapters, layers that are not there, shapes that do not fit.
    """
    if not file.is_file():
        raise BundleError(f"{file}: no such file; --lora takes a .safetensors file")
    if file.suffix != ".safetensors":
        raise BundleError(f"{file}: not a .safetensors file; pickled weights are never read")
    stored = read_header(file)
    sides: dict[str, dict[str, StoredTensor]] = {}
    alphas: dict[str, float] = {}
    peft = any(name.startswith(PEFT_PREFIX) for name in stored)
    prefix = PEFT_PREFIX if peft else DIFFUSERS_PREFIX
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise BundleError(f"{file}: tensor {name} is {tensor.dtype}; convert it to float32")
        found = _PAIR.match(name)
        if name.startswith(prefix) and found:
            layer = found["layer"].removeprefix(prefix)
            sides.setdefault(layer, {})[_SIDES[found["new"] or found["old"]]] = tensor
        elif name.startswith(prefix) and name.endswith(".alpha"):
            alphas[name.removeprefix(prefix).removesuffix(".alpha")] = float(read_tensor(tensor))
        else:
            raise BundleError(
                f"{file}: {name} is not part of a LoRA for this transformer; --lora takes what "
                "PEFT or diffusers saved for PixArt's transformer alone"
            )
    if not sides:
        raise BundleError(f"{file}: holds no LoRA; --lora takes what PEFT or diffusers saved")
    scaling = _scaling(file, peft, alphas)
    pairs = {
        f"{layer}.weight": _pair(file, layer, both, scaling, scale, layers)
        for layer, both in sorted(sides.items())
    }
    return Lora(file, scale, pairs)


def _pair(
    file: Path,
    layer: str,
    sides: Mapping[str, StoredTensor],
    scaling: Callable[[str, int], float],
    scale: float,
    layers: Mapping[str, tuple[int, ...]],
) -> Pair:
    if set(sides) != {"A", "B"}:
        raise BundleError(f"{file}: {layer} has only one of its two matrices; copy it again")
    if f"{layer}.weight" not in layers:
        raise BundleError(
            f"{file}: the transformer has no layer {layer}; use a LoRA of this transformer"
        )
    shape, down, up = layers[f"{layer}.weight"], sides["A"], sides["B"]
    rank = down.shape[0]
    fits = len(shape) > 1 and (math.prod(down.shape[1:]), up.shape[0]) == (
        math.prod(shape[1:]),
        shape[0],
    )
    if not fits or up.shape[1:2] != (rank,) or math.prod(up.shape[2:]) != 1:
        raise BundleError(
            f"{file}: {layer} is {list(shape)}, its matrices are {list(down.shape)} and "
            f"{list(up.shape)}; use a LoRA of this transformer"
        )
    return Pair(down, up, scaling(layer, rank) * scale)


def _scaling(file: Path, peft: bool, alphas: Mapping[str, float]) -> Callable[[str, int], float]:
    """alpha / r of a layer; r itself where nobody says alpha, as in diffusers."""
    config = _config(file, peft)
    root = bool(config.get("use_rslora"))  # Kalajdzievski, arXiv 2312.03732
    default = config.get("lora_alpha")
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}

    def of(layer: str, rank: int) -> float:
        special = next((v for k, v in patterns.items() if _matches(k, layer)), default)
        alpha = alphas.get(layer, special)
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if root else rank)

    return of


def _matches(pattern: str, layer: str) -> bool:
    """As PEFT reads the keys of alpha_pattern: the end of a layer's name, or all of it."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def _config(file: Path, peft: bool) -> Mapping[str, Any]:
    """PEFT's settings: beside the file, or in diffusers' header; empty if there are none."""
    where = file.parent / CONFIG
    if peft:
        if not where.is_file():
            raise BundleError(
                f"{where}: missing; PEFT's file needs it for lora_alpha, so copy both"
            )
        config = read_json(where)
    else:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(METADATA, "{}")
        where = file
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{file}: its {METADATA} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise BundleError(f"{file}: its {METADATA} is not a JSON object; save the LoRA again")
        config = {k.removeprefix(DIFFUSERS_PREFIX): v for k, v in values.items()}
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise BundleError(
                f"{where}: {key} {config[key]!r} is not supported; merge it with PEFT first, and "
                "export the result"
            )
    return config


def merge(loras: tuple[Lora, ...], name: str, weight: Tensor) -> Tensor:
    """The weight with every LoRA in it, in the given order."""
    with torch.inference_mode():
        for lora in loras:
            weight = lora.merged(name, weight)
    return weight
