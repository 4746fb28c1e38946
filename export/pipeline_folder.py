"""A diffusers pipeline folder: which files count, and what older versions called their tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.bundle import check_inside
from gentron.errors import BundleError
from gentron.weights import StoredTensor, read_header

FLOATS = ("F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Attention of autoencoders as diffusers stored it before 0.18.
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "license*", "NOTICE*")
_CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_RESTRICTED = re.compile(r"rail|non-?commercial|-nc-|\bnc\b", re.IGNORECASE)


def read_json(file: Path) -> dict[str, Any]:
    """Raises BundleError that names the file if it is missing or not a JSON object."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{file}: missing; copy the whole folder that diffusers' save_pretrained wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error
    except ValueError as error:
        raise BundleError(f"{file}: not valid JSON: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{file}: expected a JSON object; copy it again")
    return values


def pipeline_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Tensors of one part of a pipeline, from the files that diffusers would open: STEM's index and
    its shards, STEM.safetensors, or the only variant (STEM.fp16.safetensors) there is.

    Raises BundleError for pickles, missing shards, several variants and types that are not read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder, stem):
        header = read_header(file)
        if twice := sorted(set(header) & set(tensors)):
            raise BundleError(
                f"{file}: tensor {twice[0]} is also in {tensors[twice[0]].file.name}; keep one"
            )
        tensors |= header
    for name, stored in tensors.items():
        if stored.dtype not in (*FLOATS, "I64"):
            raise BundleError(
                f"{stored.file}: tensor {name} is {stored.dtype}; convert the weights to "
                "float32, float16 or bfloat16"
            )
    return tensors


def _weight_files(folder: Path, stem: str) -> list[Path]:
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder; the pipeline needs it, so copy it from the base model"
        )
    indexes = sorted(folder.glob(f"{stem}.safetensors.index*.json"))
    plain = folder / f"{stem}.safetensors"
    variants = [f for f in sorted(folder.glob(f"{stem}.*.safetensors")) if f != plain]
    if f"{stem}.safetensors.index.json" in [f.name for f in indexes]:
        return _shards(folder / f"{stem}.safetensors.index.json")
    if plain.is_file():
        return [plain]
    if len(variants) + len(indexes) == 1:
        return variants or _shards(indexes[0])
    if variants or indexes:
        found = ", ".join(file.name for file in (*variants, *indexes))
        raise BundleError(f"{folder}: several variants of the weights ({found}); keep one of them")
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise BundleError(
            f"{folder}: only pickled weights ({pickles[0]}), which are never read; load the "
            "pipeline with diffusers and save_pretrained(..., safe_serialization=True)"
        )
    raise BundleError(f"{folder}: no {stem}.safetensors and no index of shards; copy it again")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise BundleError(f"{index}: no weight_map; copy it again")
    files = []
    for name in sorted(set(names.values())):
        check_inside(name, index)
        if not (index.parent / name).is_file():
            raise BundleError(f"{index.parent / name}: missing, the index lists it; copy it again")
        files.append(index.parent / name)
    return files


def modern_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """An autoencoder's tensors under diffusers' present names."""
    return {
        _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_NAMES[m[2]]}.{m[3]}", name): stored
        for name, stored in tensors.items()
    }


@dataclass(frozen=True)
class Licence:
    """What a checkpoint says of its terms, and the files that say it (by name in the bundle)."""

    name: str  # as the card or the first line of the licence file has it; "" if nothing does
    files: dict[str, Path]

    @property
    def restricts(self) -> bool:
        """Whether its name says that some uses are not allowed (the RAIL and -NC- families)."""
        return bool(_RESTRICTED.search(self.name))


def find_licence(folder: Path) -> Licence:
    """From the model card's front matter, else from the licence file's first line of text."""
    files = {
        f"LICENSES/{'-'.join(file.relative_to(folder).parts)}": file
        for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir()))
        for pattern in _LICENCE_FILES
        for file in sorted(place.glob(pattern))
        if file.is_file()
    }
    name = ""
    if (folder / _CARD).is_file():
        files[f"LICENSES/{_CARD}"] = folder / _CARD
        name = _of_card((folder / _CARD).read_text("utf-8", "replace"))
    if not name:
        for file in files.values():
            if file.name != _CARD and file.parent == folder:
                lines = file.read_text("utf-8", "replace").splitlines()
                name = next((line.strip() for line in lines if line.strip()), "")
                break
    return Licence(name, files)


def _of_card(text: str) -> str:
    """`license_name` where `license` is only "other", as model cards are written."""
    matter = _FRONT_MATTER.match(text)
    if matter is None:
        return ""
    found: dict[str, str] = dict(
        re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", matter[1], re.MULTILINE)
    )
    if found.get("license", "other") == "other":
        return found.get("license_name", found.get("license", ""))
    return found["license"]
