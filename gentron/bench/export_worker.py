"""`python -m gentron.bench.export_worker PRESET DEPTH FOLDER COMPONENT...`: exports in a process of
its own, because exporting needs torch and its memory should end with it. DEPTH 0 is the preset's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gentron.engines.host_memory import peak_bytes
from gentron.isolated import Watch, serve
from gentron.presets import preset


def work(_: bytes, watch: Watch) -> Any:
    from gentron.export import export_bundle

    name, depth, folder, *components = sys.argv[1:]
    spec, said = preset(name), set[str]()
    if int(depth):
        spec = replace(spec, transformer=replace(spec.transformer, depth=int(depth)))

    def progress(component: str, doing: str, share: float) -> None:
        if doing not in said:
            watch(f"{component}: {doing}", share, peak_bytes() or 0)
        said.add(doing)

    path = export_bundle(model=spec, output=Path(folder), only=components, progress=progress)
    return str(path)


if __name__ == "__main__":
    sys.exit(serve(work))
