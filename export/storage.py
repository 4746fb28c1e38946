"""Writes safetensors files tensor by tensor, so that a model is never in memory at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentron.errors import BundleError
from gentron.weights import BYTES

TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {value: key for key, value in TORCH_TYPES.items()} | {torch.int64: "I64"}


@dataclass(frozen=True)
class TensorSource:
    """A tensor that can be read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the type to store it in
    read: Callable[[], Tensor]

    @property
    def length(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * BYTES[self.dtype]


def write_folder(
    folder: Path, stem: str, tensors: Sequence[TensorSource], shard_size: int
) -> list[Path]:
    """Stores the tensors as STEM.safetensors, or as numbered shards with their index, in the
    names that transformers and diffusers look for."""
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if shards[-1] and filled + tensor.length > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.length
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.length for t in tensors)},
            "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        text = json.dumps(index, indent=1, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, "utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    return [folder / name for name in names]


def _write_file(file: Path, tensors: Sequence[TensorSource]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.length],
        }
        offset += tensor.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in tensors:
            stream.write(_bytes(tensor))


def _bytes(tensor: TensorSource) -> memoryview:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise BundleError(f"tensor {tensor.name}: shape {tuple(values.shape)}, not {tensor.shape}")
    if values.is_floating_point():
        if not values.isfinite().all():
            raise BundleError(f"tensor {tensor.name}: holds NaN or infinity; repair the checkpoint")
        converted = values.to(TORCH_TYPES[tensor.dtype])
        if not converted.isfinite().all():
            raise BundleError(
                f"tensor {tensor.name}: |x| up to {values.abs().max():.3g} does not fit in "
                f"{tensor.dtype}; export with --bf16 or --fp32"
            )
        values = converted
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
