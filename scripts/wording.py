"""Writes gentron/train/wording.tsv: other words for every noun, and the colour it mostly has.

    python scripts/wording.py [--font FILE]

A line holds a noun, its colour or nothing, and words; lines of neither are left out. The words are
those of the text encoder's vocabulary whose embedding is nearer to the noun's than to any other
noun's, and near enough. Left out are words of prompts that ask for synonyms, which no caption may
use; words that captions use for something else; and plurals. It also says for how many of those
prompts the nearest noun is the right one: what can be had from the encoder alone.
"""

from __future__ import annotations

import argparse
import colorsys
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.train.clips import MOTIONS
from gentron.train.prompts import SYNONYMS
from gentron.train.scenes import COLORS, article, find_font, load_sprites, nouns
from gentron.train.strangers import FRAME, whole_words
from gentron.train.text import FrozenText
from gentron.train.wording import FILE

LEAST = 0.65  # cosine of the two embeddings
TOKENS = 12  # no noun has more
MOST_OF_INK = 0.5
# Degrees of hue below which a colour has that name.
HUES = ((14, "red"), (42, "orange"), (66, "yellow"), (170, "green"), (205, "sky blue"),
        (255, "blue"), (300, "purple"), (345, "pink"), (361, "red"))  # fmt: skip


def words_of(*phrases: str) -> set[str]:
    return {word for phrase in phrases for word in re.findall("[a-z]+", phrase.lower())}


# What the encoder finds near, and a caption should not say.
REFUSED = words_of(
    "anatolia clergy clergyman corpse cremated hiroshima kiss marijuana mcgregor ottoman paddy pee",
    "piss reggae something susanna turk turkish urine",
)
JUDGED = words_of(*SYNONYMS)
SPOKEN_FOR = words_of(*FRAME, *MOTIONS, "large little")


def is_judged(word: str) -> bool:
    """Whether it is a word of a prompt that asks for a synonym, or a form of one."""
    return any(
        word in (judged, judged + "s")
        or (len(judged) > 3 and word.startswith(judged[:-1]) and len(word) - len(judged) < 4)
        for judged in JUDGED
    )


def embedded(text: FrozenText, phrases: Sequence[str]) -> Tensor:
    pooled = [text(phrases[k : k + 256])[2] for k in range(0, len(phrases), 256)]
    return F.normalize(torch.cat(pooled).float(), dim=1)


def of_names(text: FrozenText, names: Sequence[str]) -> Tensor:
    return embedded(text, list(map(article, names)))


def right_synonyms(text: FrozenText, names: Sequence[str]) -> int:
    nearest = (embedded(text, list(SYNONYMS)) @ of_names(text, names).T).argmax(1)
    return sum(
        names[row] in wanted
        for row, wanted in zip(nearest.tolist(), SYNONYMS.values(), strict=True)
    )


def near_words(text: FrozenText, names: Sequence[str]) -> dict[str, list[str]]:
    """By noun, the nearest first."""
    vocabulary = set(whole_words(text.tokenizer))
    taken = words_of(*names) & set(names)
    words = [
        word
        for word in sorted(vocabulary - taken - SPOKEN_FOR - REFUSED)
        if not is_judged(word) and not (word.endswith("s") and word[:-1] in vocabulary | taken)
    ]
    phrases = list(map(article, words))
    nearness, nearest = (embedded(text, phrases) @ of_names(text, names).T).max(1)
    found: dict[str, list[str]] = {name: [] for name in names}
    for row in nearness.argsort(descending=True).tolist():
        if nearness[row] >= LEAST:
            found[names[int(nearest[row])]].append(words[row])
    return found


def color_of(sprite: Tensor) -> str:
    """What more than half of the ink is called, or nothing. [4, H, W]"""
    alpha = sprite[3].flatten()
    ink = (sprite[:3].flatten(1) / alpha.clamp_min(1e-6)).T[alpha > 0.5].clamp(0, 1)
    name, count = Counter(map(color_name, ink.tolist())).most_common(1)[0]
    return name if count > MOST_OF_INK * len(ink) else ""


def color_name(rgb: Sequence[float]) -> str:
    """By hue, where there is any; of the names in COLORS."""
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if saturation < 0.2 or value < 0.15:
        return "white" if value > 0.85 else "black" if value < 0.3 else "grey"
    name = next(name for above, name in HUES if hue * 360 < above)
    if name in ("red", "orange") and saturation < 0.45 and value > 0.8:
        return "pink"
    return "brown" if name in ("red", "orange") and value < 0.68 else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--font", type=Path)
    names = nouns()
    sprites = load_sprites(find_font(parser.parse_args().font), names)
    text = FrozenText(TOKENS)
    words, lines = near_words(text, names), []
    for name, sprite in zip(names, sprites, strict=True):
        color = "" if words_of(name) & words_of(*COLORS) else color_of(sprite)
        if color or words[name]:
            lines.append(f"{name}\t{color}\t{' '.join(words[name])}\n")
    file = Path(__file__).resolve().parent.parent / "gentron" / "train" / FILE
    file.write_text("".join(lines), "utf-8")
    print(f"{file}: {sum(map(len, words.values()))} words, {len(lines)} nouns")
    print(f"nearest to {right_synonyms(text, names)} of {len(SYNONYMS)} synonyms: the right noun")


if __name__ == "__main__":
    main()
