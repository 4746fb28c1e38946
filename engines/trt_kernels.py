"""The kernels that TensorRT-RTX finished on this GPU, kept from one process to the next.

An engine for several generations of GPUs is finished where it runs, which takes seconds. What came
of it lies in the user's own cache folder: it is code, as engines are. A file that is damaged, or
that TensorRT-RTX does not accept any more, is dropped with one line and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from gentron.digests import cache_folder, check_own

log = logging.getLogger(__name__)

DIGEST = hashlib.sha256().digest_size


class KernelFile:
    """One engine's kernels on one GPU: a sha256, then what `IRuntimeCache.serialize` gave."""

    def __init__(self, name: str, gpu: str, folder: Path | None = None):
        self._folder = folder or cache_folder() / "kernels"
        self.path = self._folder / f"{name}-{hashlib.sha256(gpu.encode()).hexdigest()[:8]}"
        self._kept = b""  # digest of what lies there

    def read_into(self, cache: Any) -> None:
        """Into a new IRuntimeCache; leaves it empty if there is nothing that can be used."""
        try:
            check_own(self._folder)
            check_own(self.path)
            stored = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._drop(f"cannot be read ({error})")
            return
        digest, kernels = stored[:DIGEST], stored[DIGEST:]
        # TensorRT-RTX may take a damaged one, and fail later.
        if hashlib.sha256(kernels).digest() != digest:
            self._drop("is damaged")
        elif not cache.deserialize(kernels):
            self._drop("was made by another version or for another GPU or driver")
        else:
            self._kept = digest

    def write_from(self, cache: Any) -> None:
        """Whole or not at all; nothing if nothing is new. A full disk costs seconds, not a run."""
        serialized = cache.serialize()
        if serialized is None:
            log.warning(f"{self.path}: TensorRT-RTX gave no kernels to keep; the next start waits")
            return
        kernels = bytes(memoryview(serialized))
        digest = hashlib.sha256(kernels).digest()
        if digest == self._kept:
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_own(self._folder)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(handle, "wb") as file:
                file.write(digest + kernels)
            os.replace(partial, self.path)
        except OSError as error:
            log.warning(f"{self.path}: kernels cannot be kept ({error}); the next start is slow")
            return
        finally:
            partial.unlink(missing_ok=True)
        self._kept = digest

    def _drop(self, why: str) -> None:
        log.warning(f"{self.path}: {why}; dropped, the kernels are compiled again")
        with contextlib.suppress(OSError):
            self.path.unlink()
