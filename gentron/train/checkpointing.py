"""A training run that can be stopped at any moment: its folder, its log, its resumable state."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class Run:
    """A folder with `NAME.pt` (resumable state, written atomically) and `NAME.jsonl` (the log)."""

    def __init__(self, folder: Path, name: str, *, save_every: float = 180.0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.save_every = folder, name, save_every
        self._state_file = folder / f"{name}.pt"
        self._log_file = folder / f"{name}.jsonl"
        self._saved_at = time.monotonic()

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The last saved state, or None for a new run. Our own file, plain tensors and numbers."""
        if not self._state_file.exists():
            return None
        return torch.load(self._state_file, map_location=device, weights_only=True)

    def due(self) -> bool:
        return time.monotonic() - self._saved_at > self.save_every

    def save(self, state: dict[str, Any]) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self._state_file)
        self._saved_at = time.monotonic()

    def log(self, **values: Any) -> None:
        with self._log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def forget(self, *, after: int) -> None:
        """Drops what was logged after a step that training goes back to."""
        kept = [row for row in self.history() if row["step"] <= after]
        self._log_file.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")

    def history(self) -> list[dict[str, Any]]:
        if not self._log_file.exists():
            return []
        return [json.loads(line) for line in self._log_file.read_text("utf-8").splitlines()]
