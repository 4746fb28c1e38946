"""`python -m gentron.export.worker FOLDER NOTES COMPONENT PRECISIONS`: one component's process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gentron.export.component import export_component, peak_bytes
from gentron.export.source import read_source
from gentron.isolated import Watch, serve


def work(_: bytes, watch: Watch) -> Any:
    folder, notes, component, precisions = sys.argv[1:]
    exported = export_component(
        Path(folder),
        Path(notes),
        read_source(Path(folder)),
        component,
        precisions.split(","),
        progress=lambda _, doing, share: watch(doing, share, peak_bytes()),
    )
    return json.loads(exported.to_json())


if __name__ == "__main__":
    sys.exit(serve(work))
