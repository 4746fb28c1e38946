"""Prompts to ids with the bundle's own tokenizer.json; says which words did not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gentron.errors import BundleError


@dataclass(frozen=True)
class Tokens:
    ids: npt.NDArray[np.int64]  # [L]
    mask: npt.NDArray[np.int64]  # [L], 1 = token, 0 = padding
    lost: str  # the end of the prompt that was cut off, "" if all of it fits


class PromptTokenizer:
    """Cuts and pads to `max_tokens`, as the file itself is set up to; safe to share by threads.

    `lower_case` lower-cases and strips the prompt first, as PixArt's pipelines do.
    """

    def __init__(self, file: Path, max_tokens: int, *, lower_case: bool = False):
        from tokenizers import Tokenizer

        self._lower_case = lower_case

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise BundleError(f"{file}: not a readable tokenizer: {error}") from error
        for setting in ("padding", "truncation"):
            found = getattr(self._tokenizer, setting) or {}
            length = found.get("length", found.get("max_length"))
            if length != max_tokens:
                raise BundleError(
                    f"{file}: {setting} to {length} tokens, the text encoder takes {max_tokens}; "
                    "export the bundle again"
                )

    def __call__(self, prompt: str) -> Tokens:
        if self._lower_case:
            prompt = prompt.lower().strip()
        encoding = self._tokenizer.encode(prompt)
        lost = ""
        if encoding.overflowing:
            kept = [end for (_, end), special in
                    zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
                    if not special]  # fmt: skip
            lost = prompt[max(kept, default=0) :].strip()
        return Tokens(
            np.asarray(encoding.ids, np.int64), np.asarray(encoding.attention_mask, np.int64), lost
        )
