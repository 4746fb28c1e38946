"""A bundle: exported graphs beside the weights they read, and a manifest that names every file.

Nothing in it is code and nothing is unpickled. Every file's size and sha256 are checked before
anything is loaded, so a truncated, swapped or edited file is named rather than run. Files that were
checked before and have not changed since are not read again (`gentron/digests.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import gentron
from gentron.config import GenTronConfig, SamplingDefaults
from gentron.contract import Component, contract, text_encoder_name
from gentron.digests import first_differing, read_digest
from gentron.errors import BundleError, RequestError
from gentron.latents import native_size, vae_factor
from gentron.schedule import NoiseSchedule

FORMAT = 1
MANIFEST = "gentron.json"
REPORT = "export-report.json"  # measurements: outside the digest
NULL_TEXT = "transformer/null_text.safetensors"  # embeddings of the empty prompt
PACKAGED = Path(gentron.__file__).resolve().parent / "bundles"

# How files are checked when a bundle is opened. Sizes always are; digests
#   "remembered"  where a file could have changed since its digest was last taken,
#   "all"         of every file, read anew: finds what a failing disk changed behind dates,
#   "sizes"       not at all: for folders that something else vouches for, such as an image layer.
Verify = Literal["remembered", "all", "sizes"]


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    name: str
    weights: str  # "trained" or "random"
    storage: str  # safetensors type of most weights: F16, BF16, F32
    precisions: dict[str, tuple[str, ...]]  # component -> precisions it has graphs for
    defaults: SamplingDefaults
    provenance: dict[str, Any]
    licences: tuple[dict[str, str], ...]
    files: dict[str, FileEntry]
    contract: dict[str, Any]
    probes: dict[str, str] = field(default_factory=dict)  # component -> file
    version: str = gentron.__version__
    format: int = FORMAT

    def to_json(self) -> str:
        values = {
            "format": self.format,
            "version": self.version,
            "name": self.name,
            "weights": self.weights,
            "storage": self.storage,
            "defaults": vars(self.defaults),
            "precisions": {key: list(value) for key, value in sorted(self.precisions.items())},
            "probes": dict(sorted(self.probes.items())),
            "provenance": self.provenance,
            "licences": list(self.licences),
            "contract": self.contract,
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Raises BundleError for another format, a missing or mistyped field, an unsafe path."""
        try:
            values = json.loads(text)
            _check_format(values["format"])
            manifest = cls(
                name=_one_of(values, "name"),
                weights=_one_of(values, "weights", "trained", "random"),
                storage=_one_of(values, "storage", "F16", "BF16", "F32"),
                precisions={key: tuple(value) for key, value in values["precisions"].items()},
                defaults=SamplingDefaults(**values["defaults"]),
                provenance=dict(values["provenance"]),
                licences=tuple(values["licences"]),
                files={
                    name: FileEntry(str(entry["sha256"]), int(entry["size"]))
                    for name, entry in values["files"].items()
                },
                contract=dict(values["contract"]),
                probes={key: str(value) for key, value in values["probes"].items()},
                version=str(values["version"]),
            )
        except BundleError as error:
            raise BundleError(f"{where}: {error}") from error
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise BundleError(
                f"{where}: not a valid manifest ({type(error).__name__}: {error}); "
                "export the bundle again"
            ) from error
        for name in (*manifest.files, *manifest.probes.values()):
            check_inside(name, where)
        return manifest


def _check_format(found: Any) -> None:
    if type(found) is not int:  # true and 1.0 equal 1
        raise ValueError(f"format is {found!r}, not a whole number")
    reads = f"this version ({gentron.__version__}) reads, which is format {FORMAT}"
    if found > FORMAT:
        raise BundleError(f"bundle format {found} is newer than {reads}; upgrade gentron")
    if found < FORMAT:
        raise BundleError(f"bundle format {found} is older than {reads}; export the bundle again")


def _one_of(values: dict[str, Any], field: str, *allowed: str) -> str:
    value = values[field]
    if not isinstance(value, str) or (allowed and value not in allowed):
        raise ValueError(f"{field} is {value!r}")
    return value


def check_inside(name: str, where: Path) -> None:
    """A manifest's path may not leave the bundle, whatever the operating system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise BundleError(f"{where}: the path {name!r} leaves the bundle; do not use this bundle")


def tokenizer_file(encoder: int) -> PurePosixPath:
    """diffusers' folders: tokenizer, tokenizer_2."""
    folder = "tokenizer" if encoder == 0 else f"tokenizer_{encoder + 1}"
    return PurePosixPath(folder, "tokenizer.json")


def null_text_names(encoders: int) -> list[tuple[str, str]]:
    """Tensor names of the stored empty prompt, per encoder (hidden, mask)."""
    return [(f"hidden_{i + 1}", f"mask_{i + 1}") for i in range(encoders)]


def packaged_names() -> list[str]:
    """Bundles that ship inside the package."""
    return sorted(folder.parent.name for folder in PACKAGED.glob(f"*/{MANIFEST}"))


def locate(name_or_path: str | Path) -> Path:
    """A packaged bundle's name, or a folder; raises BundleError that lists what there is."""
    if str(name_or_path) in packaged_names():
        return PACKAGED / str(name_or_path)
    folder = Path(name_or_path)
    if str(name_or_path) and os.path.isfile(folder / MANIFEST):  # False for impossible names
        return folder.resolve()
    if str(name_or_path) and os.path.isfile(folder / "model_index.json"):
        raise BundleError(
            f"{folder}: a checkpoint, not a bundle; run: gentron-export --checkpoint {folder}"
        )
    raise BundleError(
        f"bundle {str(name_or_path)!r} was not found: it is neither a folder with {MANIFEST} nor "
        f"one of the packaged bundles ({', '.join(packaged_names()) or 'none'}); "
        "make one with gentron-export --model PRESET"
    )


def sha256_file(file: Path) -> str:
    return read_digest(file).sha256


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: verified files, the model's configuration, its contract."""

    path: Path
    manifest: Manifest
    digest: str  # sha256 of the manifest, which holds the sha256 of everything else
    config: GenTronConfig
    schedule: NoiseSchedule
    vae_factor: int
    components: Mapping[str, Component]

    @classmethod
    def open(cls, name_or_path: str | Path, *, verify: Verify = "remembered") -> Bundle:
        """Reads and checks a bundle, by packaged name or folder; `Verify` says how thoroughly.

        A bundle that was exported with --only opens as well: see `missing`. Raises BundleError
        that names the file at fault.
        """
        if verify not in get_args(Verify):
            raise RequestError(
                "verify", f"must be one of {', '.join(get_args(Verify))}, got {verify!r}"
            )
        path = locate(name_or_path)
        text = _read(path / MANIFEST)
        manifest = Manifest.from_json(text, path / MANIFEST)
        verify_files(path, manifest, verify)
        config = GenTronConfig.from_dict(_config(path / "transformer" / "config.json"))
        factor = vae_factor(_config(path / "vae" / "config.json"))
        components = contract(config, factor)
        derived = {name: component.to_dict() for name, component in components.items()}
        if json.loads(json.dumps(derived)) != manifest.contract:
            raise BundleError(
                f"{path}: its contract is not the one this version derives from its "
                "configuration; export it again with this version"
            )
        _check_listed(path, manifest, components)
        return cls(
            path=path,
            manifest=manifest,
            digest=hashlib.sha256(text.encode()).hexdigest(),
            config=config,
            schedule=NoiseSchedule.from_config(
                _config(path / "scheduler" / "scheduler_config.json", keep_class=True)
            ),
            vae_factor=factor,
            components=components,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        return native_size(self.config, self.vae_factor)

    @property
    def missing(self) -> tuple[str, ...]:
        """Components without a graph, which an export with --only left out."""
        return tuple(name for name in self.components if not self.manifest.precisions.get(name))

    def check_complete(self) -> None:
        """Raises BundleError that names the components an export with --only left out."""
        if self.missing:
            raise BundleError(
                f"{self.path}: exported with --only, without {', '.join(self.missing)}; "
                "export again without --only"
            )

    def graph(self, component: str, precision: str) -> Path:
        """The component's graph; raises BundleError that says which one there is not, and
        RequestError for a component that the model does not have."""
        if component not in self.components:
            raise RequestError(
                "component", f"must be one of {', '.join(self.components)}, got {component!r}"
            )
        there = self.manifest.precisions.get(component, ())
        if not there:
            raise BundleError(
                f"{self.path}: has no {component}, because it was exported with --only; "
                "export again without --only"
            )
        if precision not in there:
            raise BundleError(
                f"{self.path}: {component} has no {precision} graph, only {', '.join(there)}; "
                f"export it again with --{precision}"
            )
        return self.path / self.components[component].graph_file(precision)


def verify_files(path: Path, manifest: Manifest, verify: Verify) -> None:
    """Names the first file that is missing, of another size, outside the folder, or altered."""
    root = path.resolve()
    for name, entry in manifest.files.items():
        file = path / name
        if not os.path.isfile(file):  # False for impossible names
            raise BundleError(f"{file}: missing from the bundle; copy or export it again")
        if not file.resolve().is_relative_to(root):
            raise BundleError(f"{file}: a link that leaves the bundle; replace it by a copy")
        if (size := file.stat().st_size) != entry.size:
            raise BundleError(
                f"{file}: {size} bytes, the manifest says {entry.size}: truncated or replaced; "
                "copy or export it again"
            )
    if verify == "sizes":
        return
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    if wrong := first_differing(path, digests, anew=verify == "all"):
        raise BundleError(
            f"{path / wrong}: contents differ from the manifest's sha256: swapped, edited or "
            "damaged; copy or export it again"
        )


def _check_listed(path: Path, manifest: Manifest, components: Mapping[str, Component]) -> None:
    """Whatever is read by name must have a digest. Of a part that an export with --only left out,
    only its configuration is read."""
    there = [name for name, precisions in manifest.precisions.items() if precisions]
    if unknown := sorted(set(there) - set(components)):
        raise BundleError(
            f"{path / MANIFEST}: precisions of the unknown component {unknown[0]!r}; "
            "export the bundle again"
        )
    read = ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    read += manifest.probes.values()
    encoders = [i for i in range(len(components)) if text_encoder_name(i) in there]
    read += [str(tokenizer_file(i)) for i in encoders]
    read += [NULL_TEXT] * bool(encoders)
    read += [
        components[name].graph_file(precision)
        for name in there
        for precision in manifest.precisions[name]
    ]
    if missing := [name for name in read if name not in manifest.files]:
        raise BundleError(
            f"{path / missing[0]}: the manifest has no digest of it; export the bundle again"
        )


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error


def _config(file: Path, *, keep_class: bool = False) -> dict[str, Any]:
    try:
        values = json.loads(_read(file))
    except ValueError as error:
        raise BundleError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{file}: expected a JSON object")
    if keep_class:
        return values
    return {key: value for key, value in values.items() if not key.startswith("_")}
