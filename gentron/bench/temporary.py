"""A preset as a bundle that holds only what is to be measured, with random weights.

It lies in the user's cache folder and is made once: for `xl2` a gigabyte and some minutes.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gentron.bench.ours import mark_temporary
from gentron.bench.work import stage_components
from gentron.bundle import Bundle, packaged_names
from gentron.contract import contract
from gentron.digests import cache_folder
from gentron.errors import BundleError, RequestError
from gentron.isolated import run_isolated
from gentron.latents import vae_factor
from gentron.presets import PRESETS, preset


def is_preset(name: str) -> bool:
    """Whether it names a preset and no bundle."""
    return name in PRESETS and name not in packaged_names() and not Path(name).exists()


def find_bundle(
    name: str, stages: Sequence[str], say: Callable[[str], None], depth: int = 0
) -> Bundle:
    """A bundle by name or folder, or that of a preset, of which what the stages need is exported
    if it is not there yet; `depth` keeps so many of a preset's blocks.

    Raises BundleError for a name that is neither, and RequestError if the export needs packages
    that are not installed.
    """
    if not is_preset(name):
        if depth:
            raise RequestError("depth", f"is for presets; one of {', '.join(PRESETS)}")
        return Bundle.open(name)
    spec = preset(name)
    if depth:
        spec = replace(spec, transformer=replace(spec.transformer, depth=depth))
    names = contract(spec.transformer, vae_factor(spec.vae))
    wanted = [name for stage in stages for name in stage_components(names, stage)]
    cut = [f"{depth}-blocks"] if depth else []
    folder = cache_folder() / "bench" / "-".join([name, *cut, *wanted])
    try:
        found = Bundle.open(folder)
        if found.config == spec.transformer:
            return found
    except BundleError as error:
        say(f"{folder}: {error}" if folder.exists() else f"{name}: a preset, to be exported once")
    if importlib.util.find_spec("torch") is None:
        raise RequestError(
            "bundle", f"{name} is a preset: to export it, run: pip install 'gentron[export]'"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"exporting {', '.join(wanted)} of {name} with random weights to {folder}")
    run_isolated(
        name,
        "gentron.bench.export_worker",
        [name, str(depth), str(folder), *wanted],
        folder.with_suffix(".log"),
        lambda doing, share, _: say(f"{doing}, {share:.0%}"),
    )
    mark_temporary(folder)
    return Bundle.open(folder)
