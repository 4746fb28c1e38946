"""Where each tensor lies inside a folder of safetensors files, without reading the tensors."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.bundle import NULL_TEXT
from gentron.errors import BundleError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    offset: int  # of the first byte, from the start of the file
    length: int  # bytes
    dtype: str  # as safetensors spells it: F16, F32, BF16, ...
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; raises BundleError if the file is damaged or too short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            (length,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
            if length + 8 > size or length > MAX_HEADER:
                raise BundleError(f"{file}: truncated or not a safetensors file; copy it again")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {n: _stored(file, size, 8 + length, n, entry) for n, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(f"{file}: not a readable safetensors file: {error!r}") from error


def _stored(file: Path, size: int, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in BYTES:
        raise BundleError(f"{file}: tensor {name} has the unknown type {dtype}")
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise BundleError(f"{file}: tensor {name} has impossible offsets or sides; copy it again")
    if start + end > size:
        raise BundleError(f"{file}: truncated inside tensor {name}; copy the file again")
    if end - begin != math.prod(shape) * BYTES[dtype]:
        raise BundleError(f"{file}: tensor {name} is not as long as its shape; copy it again")
    return StoredTensor(file, start + begin, end - begin, dtype, shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, shards merged; names must be unique."""
    files = sorted(f for f in folder.glob("*.safetensors") if f.name != Path(NULL_TEXT).name)
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]
        hint = "; pickled weights are never read, convert them to safetensors" if pickles else ""
        raise BundleError(f"{folder}: no .safetensors file{hint}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        if twice := sorted(set(header) & set(tensors)):
            raise BundleError(f"{file}: tensor {twice[0]} is also in {tensors[twice[0]].file.name}")
        tensors.update(header)
    return tensors
