"""Writes safetensors files tensor by tensor, so that a model is never in memory at once."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class Journal(Protocol):
    """Remembers finished files across interruptions."""

    def digest(self, file: Path) -> str | None:
        """sha256 of a file that was finished before, if it is still as it was."""

    def finished(self, file: Path, sha256: str) -> None: ...


def write_folder(
    folder: Path,
    stem: str,
    tensors: Sequence[TensorSource],
    shard_size: int,
    *,
    journal: Journal,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Path]:
    """Stores the tensors as STEM.safetensors, or as numbered shards with their index, in the
    names that transformers and diffusers look for. Shards finished before are not written again.
    """
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if shards[-1] and filled + tensor.length > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.length
    total = sum(t.length for t in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        text = json.dumps(index, indent=1, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, "utf-8")
    written = 0
    for name, shard in zip(names, shards, strict=True):
        if journal.digest(folder / name) is None:
            for length in _write_file(folder / name, shard, journal):
                written += length
                progress(written / max(1, total))
        else:
            written += sum(t.length for t in shard)
    return [folder / name for name in names]


def _write_file(file: Path, tensors: Sequence[TensorSource], journal: Journal) -> Iterator[int]:
    """Yields the bytes of each tensor once they are written; the file appears when whole."""
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
    digest = hashlib.sha256()
    unfinished = file.with_name(f"{file.name}.unfinished")
    with unfinished.open("wb") as stream:
        for piece in (struct.pack("<Q", len(text)), text):
            stream.write(piece)
            digest.update(piece)
        for tensor in tensors:
            values = _bytes(tensor)
            stream.write(values)
            digest.update(values)
            yield tensor.length
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
    journal.finished(file, digest.hexdigest())


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
