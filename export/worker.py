"""`python -m gentron.export.worker FOLDER NOTES COMPONENT PRECISIONS`: one component's process.

Speaks lines of JSON on standard output: progress, and at last what was exported or the error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from gentron.errors import GenTronError
from gentron.export.component import export_component, peak_bytes
from gentron.export.isolate import FAILED
from gentron.export.source import read_source


def main() -> int:
    folder, notes, component, precisions = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        exported = export_component(
            Path(folder),
            Path(notes),
            read_source(Path(folder)),
            component,
            precisions.split(","),
            progress=lambda _, doing, share: _say(
                {"doing": doing, "share": share, "peak": peak_bytes()}
            ),
        )
    except GenTronError as error:
        _say({"error": type(error).__name__, "text": str(error)})
        return FAILED
    _say({"exported": json.loads(exported.to_json())})
    return 0


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Standard input ends when the parent does, even if it was killed."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
