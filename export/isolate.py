"""A component exported in a process of its own: its memory ends with it, and can be measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gentron.export.component import Exported, Progress
from gentron.isolated import run_isolated


def export_isolated(
    folder: Path, notes: Path, component: str, precisions: Sequence[str], progress: Progress
) -> Exported:
    """As `export_component`, which the worker calls; raises what it raises, and ResourceError
    if the process was killed."""
    done = run_isolated(
        component,
        "gentron.export.worker",
        [str(folder), str(notes), component, ",".join(precisions)],
        notes / f"{component}.log",
        lambda doing, share, _: progress(component, doing, share),
        again="repeat the command with --resume",
    )
    return Exported.from_json(json.dumps(done.result))
