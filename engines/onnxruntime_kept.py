"""What ONNX Runtime's TensorRT providers compiled for this GPU, kept from one process to the next.

They write and find their files themselves. It is code, as engines are: it lies in a folder of the
user's own, and is loaded again only if it is what was there when it passed the golden probes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from gentron.digests import DAMAGED, cache_folder, check_own, first_differing, read_digest
from gentron.engines.base import Graph
from gentron.errors import BackendError, BundleError

log = logging.getLogger(__name__)

SEAL = "sealed.json"  # sha256 by name, of everything else in the folder


def kept_name(graph: Graph, precision: str, where: str) -> str:
    """Of everything that decides what is compiled; `where` is provider, version and GPU."""
    profiles = [{axis: str(sizes) for axis, sizes in sorted(p.items())} for p in graph.profiles]
    text = json.dumps([graph.digest, precision, profiles, where])
    return f"{graph.component.name}-{precision}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class KeptFolder:
    def __init__(self, name: str, folder: Path | None = None):
        self._parent = folder or cache_folder() / "onnxruntime"
        self.path = self._parent / name
        self.sealed = False

    def open(self) -> bool:
        """Makes the folder; whether what is in it was proved and is unaltered. What is not goes."""
        try:
            self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_own(self._parent)
            if self.path.exists():
                check_own(self.path)
            if not (problem := self._problem()):
                self.sealed = True
                return True
            if (self.path / SEAL).exists():
                log.warning(f"{self.path}: {problem}; dropped, it is compiled again")
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise BackendError(
                f"engine cache: {error.strerror or error}: {self.path}; engines are code, so only "
                "you may write there; set XDG_CACHE_HOME to a folder of your own"
            ) from error
        return False

    def seal(self) -> None:
        """After the proof, and whenever a provider may have written more."""
        files = {f.name: read_digest(f).sha256 for f in self._files()}
        partial = self.path / f".{SEAL}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(files))
            os.replace(partial, self.path / SEAL)
            self.sealed = True
        except OSError as error:
            log.warning(f"{self.path}: cannot be kept ({error}); the next start compiles again")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(f for f in self.path.iterdir() if f.is_file() and SEAL not in f.name)

    def _problem(self) -> str:
        """Why what is there is not to be loaded, or nothing."""
        try:
            sealed = {str(name): str(sha) for name, sha in json.loads(
                (self.path / SEAL).read_text("utf-8")).items()}  # fmt: skip
            if set(sealed) != {file.name for file in self._files()}:
                return "has files that were not there when it was proved, or lacks some"
            wrong = first_differing(self.path, sealed)
        except (OSError, BundleError) as error:
            return f"cannot be read ({error})"
        except (*DAMAGED, AttributeError) as error:
            return f"{SEAL} is damaged ({type(error).__name__})"
        return f"{wrong} was edited or damaged" if wrong else ""
