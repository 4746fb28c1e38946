"""Captions with strange words in the place of their nouns, for a network to lean towards.

What the text encoder gives for a word that no caption held lies near what it gives for one that
captions held, but not on it. So a network is shown captions on the way to others, by up to half:
"a dog" with a third of "a treaty" is still to draw a dog. It learns what lies around every noun,
out to where the next one is as near.
"""

from __future__ import annotations

import re

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gentron.train.clips import MOTIONS, STILL
from gentron.train.scenes import COLORS, PLACES, SIZE_WORDS, VERBS
from gentron.train.text import FrozenText

LEAN_SHARE = 0.5  # of the captions
LEAN_MOST = 0.5  # of the way
WHOLE_WORD = re.compile(r"[a-z]{3,}")
# What captions are made of besides nouns.
FRAME = (*COLORS, *PLACES, *VERBS, *MOTIONS.values(), STILL, *SIZE_WORDS, "a", "an", ",",
         "background")  # fmt: skip


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """The words of letters that are one token each, sorted."""
    return sorted(w for w in tokenizer.get_vocab() if WHOLE_WORD.fullmatch(w))


def estranged(text: FrozenText, ids: Tensor, seed: int) -> Tensor:
    """Token ids [U, L] of captions -> the same with a whole word, drawn by lot, for each token that
    belongs to a noun. What is left has its places, and so has the padding."""
    # Each padded, and between the marks of a beginning and an end, which are kept as well.
    frame = sorted({token for phrase in FRAME for token in text.tokenizer.encode(phrase).ids})
    words = torch.tensor([text.tokenizer.token_to_id(w) for w in whole_words(text.tokenizer)])
    generator = torch.Generator().manual_seed(seed)
    drawn = words[torch.randint(len(words), ids.shape, generator=generator)].to(ids.device)
    return torch.where(torch.isin(ids, torch.tensor(frame, device=ids.device)), ids, drawn)


def leanings(count: int, generator: torch.Generator) -> Tensor:
    """How far each of so many captions is on its way to the strange one, [R] in [0, 0.5)."""
    device = generator.device
    leans = torch.rand(count, generator=generator, device=device) < LEAN_SHARE
    return leans * LEAN_MOST * torch.rand(count, generator=generator, device=device)
