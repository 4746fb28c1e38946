"""Prompts to embeddings, once per new prompt: a bounded cache in front of the text encoders."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.bundle import NULL_TEXT, Bundle, null_text_names, tokenizer_file
from gentron.contract import text_encoder_name
from gentron.engines import Engine
from gentron.errors import BundleError
from gentron.runtime.finite import check_finite
from gentron.runtime.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)
CACHED_PROMPTS = 64  # about 50 kB each for `emoji`, 2 MB for CLIP-L with T5-XXL


@dataclass(frozen=True)
class EncodedText:
    """One prompt through every encoder of the model, on the host; arrays are read-only."""

    prompt: str
    hidden: tuple[npt.NDArray[np.float32], ...]  # per encoder [L, W]
    mask: tuple[npt.NDArray[np.int64], ...]  # per encoder [L]
    pooled: npt.NDArray[np.float32] | None  # [P]
    lost: str  # words that the shortest tokenizer cut off


class TextStage:
    """Tokenizers, encoders and cache; may be called from several threads."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]):
        self._config = bundle.config
        self._engines = engines
        self._tokenizers = [
            PromptTokenizer(
                bundle.path / tokenizer_file(i), text.max_tokens, lower_case=text.lower_case
            )
            for i, text in enumerate(bundle.config.text)
        ]
        self._cache: OrderedDict[str, EncodedText] = OrderedDict()
        self._lock = threading.Lock()
        self._null = _stored_null(bundle)

    def encode(self, prompts: Sequence[str]) -> list[EncodedText]:
        """Each prompt on its own, so that an embedding never depends on its neighbours."""
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: str) -> EncodedText:
        if prompt == "":
            return self._null
        with self._lock:
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
                return self._cache[prompt]
        encoded = self._run(prompt)
        with self._lock:
            self._cache[prompt] = encoded
            while len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        return encoded

    def _run(self, prompt: str) -> EncodedText:
        tokens = [tokenizer(prompt) for tokenizer in self._tokenizers]
        hidden, pooled = [], None
        for index, one in enumerate(tokens):
            engine = self._engines[text_encoder_name(index)]
            out = engine.run({"input_ids": one.ids[None], "attention_mask": one.mask[None]})
            for values in out.values():
                check_finite(values, engine.component.name)
            hidden.append(_frozen(out["hidden"][0]))
            if "pooled" in out:
                pooled = _frozen(out["pooled"][0])
        lost = max((one.lost for one in tokens), key=len)
        return EncodedText(
            prompt, tuple(hidden), tuple(_frozen(t.mask) for t in tokens), pooled, lost
        )


def _stored_null(bundle: Bundle) -> EncodedText:
    """Raises BundleError where it is not what this model's encoders give."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file, config = bundle.path / NULL_TEXT, bundle.config
    try:
        values = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file}: not a readable safetensors file: {error}") from error
    names = null_text_names(len(config.text))
    wanted: dict[str, tuple[int, ...]] = {}
    for (hidden, mask), text in zip(names, config.text, strict=True):
        wanted |= {hidden: (text.max_tokens, text.width), mask: (text.max_tokens,)}
    if config.pooled_width:
        wanted["pooled"] = (config.pooled_width,)
    for name, shape in wanted.items():
        kind = np.int64 if name.startswith("mask") else np.float32
        found = values.get(name)
        if found is None or found.shape != shape or found.dtype != kind:
            raise BundleError(
                f"{file}: {name} must be {np.dtype(kind)} {list(shape)}; export the bundle again"
            )
    return EncodedText(
        prompt="",
        hidden=tuple(_frozen(values[hidden]) for hidden, _ in names),
        mask=tuple(_frozen(values[mask]) for _, mask in names),
        pooled=_frozen(values["pooled"]) if config.pooled_width else None,
        lost="",
    )


def _frozen(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    values.setflags(write=False)
    return values
