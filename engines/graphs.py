"""A bundle's graphs as engines want them: with digest, probes and the shapes to compile for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

from gentron.bundle import Bundle
from gentron.engines.base import Graph
from gentron.engines.shapes import Declaration, default_declaration, parse_declaration


def declarations(bundle: Bundle, profiles: Sequence[str]) -> list[Declaration]:
    """What `--profile` says, in words of this bundle; raises RequestError. Empty for defaults."""
    config, factor = bundle.config, bundle.vae_factor
    default = default_declaration(config, factor, steps=bundle.manifest.defaults.steps)
    return [parse_declaration(text, default, config, factor) for text in profiles]


class Precise(Protocol):
    """A backend or a compiler: what computes in some precisions, from graphs in some."""

    precisions: tuple[str, ...]

    def graph_precision(self, precision: str) -> str: ...


def decoder_default(bundle: Bundle, owner: Precise) -> str:
    """The first of the owner's precisions for which the decoder has a graph: many autoencoders
    leave the range of float16, and then there is none in float16."""
    there = bundle.manifest.precisions.get("vae_decoder", ())
    fitting = [p for p in owner.precisions if owner.graph_precision(p) in there]
    return (fitting or owner.precisions)[0]


def bundle_graph(
    bundle: Bundle, name: str, precision: str, declared: Sequence[Declaration] = ()
) -> Graph:
    """The component's graph in one precision; raises BundleError if the bundle has none."""
    component, factor = bundle.components[name], bundle.vae_factor
    flexible = not declared
    declared = declared or [
        default_declaration(bundle.config, factor, steps=bundle.manifest.defaults.steps)
    ]
    profiles = [d.profile(component, factor) for d in declared]
    probes = bundle.manifest.probes.get(name)
    return Graph(
        component=component,
        file=bundle.graph(name, precision),
        precision=precision,
        side_factor=factor,
        digest=_digest(bundle, name, precision),
        probes=bundle.path / probes if probes else None,
        profiles=tuple(p for i, p in enumerate(profiles) if p not in profiles[:i]),
        flexible=flexible,
    )


def _digest(bundle: Bundle, name: str, precision: str) -> str:
    """From the manifest, whose digests were checked when the bundle was opened.

    Counts every weight file in the graph's folder, because which of them it reads stands only in
    the graph; the components that share a folder come from one checkpoint anyway.
    """
    component, digest = bundle.components[name], hashlib.sha256()
    read = [component.graph_file(precision)]
    for file in sorted(bundle.manifest.files):
        path = PurePosixPath(file)
        if path.suffix == ".safetensors" and str(path.parent) == component.folder:
            read.append(file)
    for file in read:
        digest.update(f"{file} {bundle.manifest.files[file].sha256}\n".encode())
    return digest.hexdigest()
