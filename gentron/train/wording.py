"""What captions call a noun besides its name: other words for it, and the colour it mostly has.

A network that meets each noun under one name learns the names by heart, and for a word beside them
it draws anything at all. The text encoder knows better: what it gives for "a canine" is nearest to
what it gives for "a dog", so captions call dogs canines now and then. `wording.tsv`, which
scripts/wording.py writes, holds such words of the encoder's own vocabulary; none is in a prompt
that asks for synonyms (prompts.SYNONYMS).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FILE = "wording.tsv"
OTHER_WORD = 0.3  # of a noun's captions, where there are other words for it
COLOR_WORD = 0.1  # where it has a colour


@dataclass(frozen=True)
class Wording:
    """What is known of one noun."""

    color: str  # that more than half of its ink has, or nothing
    words: tuple[str, ...]


@cache
def wordings() -> Mapping[str, Wording]:
    """By noun; nouns of which nothing is known are left out."""
    text = files("gentron.train").joinpath(FILE).read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return {noun: Wording(color, tuple(words.split())) for noun, color, words in rows}


class Namer:
    """What captions call nouns, from a seeded stream of its own."""

    def __init__(self, known: Mapping[str, Wording], seed: int | str):
        self.known, self.random = known, random.Random()
        self.reseed(seed)

    def reseed(self, seed: int | str) -> None:
        self.random.seed(f"wording {seed}")

    def name(self, noun: str) -> str:
        """The noun, or another word for it; in some captions, after its colour."""
        wording, called = self.known.get(noun), noun
        if wording is None:
            return noun
        if wording.words and self.random.random() < OTHER_WORD:
            called = self.random.choice(wording.words)
        if wording.color and self.random.random() < COLOR_WORD:
            called = f"{wording.color} {called}"
        return called
