"""A preset as a bundle that holds only what is to be measured, with random weights.

It lies in the user's cache folder and is made once: for `xl2` a gigabyte and some minutes.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gentron.bench.ours import mark_temporary
from gentron.bench.work import stage_components
from gentron.bundle import Bundle
from gentron.contract import contract
from gentron.digests import cache_folder
from gentron.errors import BundleError, RequestError, ResourceError
from gentron.latents import vae_factor
from gentron.presets import PRESETS, preset

EXPORT = "import sys; sys.argv[0] = 'gentron-export'; from gentron.cli.export import main; main()"


def find_bundle(name: str, stages: Sequence[str], say: Callable[[str], None]) -> Bundle:
    """A bundle by name or folder, or that of a preset, of which what the stages need is exported
    if it is not there yet.

    Raises BundleError for a name that is neither, and RequestError if the export needs packages
    that are not installed.
    """
    try:
        return Bundle.open(name)
    except BundleError:
        if name not in PRESETS or Path(name).exists():
            raise
    spec = preset(name)
    names = contract(spec.transformer, vae_factor(spec.vae))
    wanted = [name for stage in stages for name in stage_components(names, stage)]
    folder = cache_folder() / "bench" / "-".join([name, *wanted])
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
    command = [sys.executable, "-c", EXPORT, "--model", name, "-o", str(folder)]
    command += [part for component in wanted for part in ("--only", component)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ResourceError(
            f"{name}: the export ended with {done.returncode}; see above, then repeat the command"
        )
    mark_temporary(folder)
    return Bundle.open(folder)
