"""What a model is asked for: sets of prompts that depend on the vocabulary and on nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from gentron.errors import RequestError
from gentron.train.scenes import (
    COLORS,
    PLACED_SIZE,
    PLACES,
    VERBS,
    Placement,
    Scene,
    article,
    held_out_color,
    near,
    nouns,
)

NUM_PAIRS = 200
NUM_SIZED = 60  # nouns, each asked for small and huge
NUM_PLACED = 96  # nouns, each asked for at one of the places
OFF_PLACE = 0.1  # of the picture's side, that a centre may be away from where it was asked for
# Between the sizes that captions call small, plain and huge in training (scenes.SceneSampler).
SMALL_BELOW, HUGE_ABOVE = 0.575, 0.92
SIZES = {"small": (0.35, 0.5), "huge": (0.95, 1.1)}
PLAIN_SIZE, PAIR_SIZE = (0.65, 0.95), (0.5, 0.58)
OTHER = "other"  # the category of nouns that the package does not know

# Phrases that no caption holds, and the nouns that answer them.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "a puppy": ("dog", "poodle"),
    "a kitty": ("cat", "black cat"),
    "a bunny": ("rabbit",),
    "a pony": ("horse",),
    "a lamb": ("ewe", "ram"),
    "an alligator": ("crocodile",),
    "a hippo": ("hippopotamus",),
    "a rhino": ("rhinoceros",),
    "a ladybug": ("lady beetle",),
    "a bee": ("honeybee",),
    "a dinosaur": ("sauropod", "t-rex"),
    "an airplane in the sky": ("airplane",),
    "a car": ("automobile", "sport utility vehicle", "taxi", "racing car", "police car"),
    "a cab": ("taxi",),
    "a truck": ("delivery truck", "articulated lorry", "pickup truck"),
    "a bike": ("bicycle",),
    "a motorbike": ("motorcycle",),
    "a moped": ("motor scooter",),
    "a boat": ("sailboat", "speedboat", "motor boat", "canoe"),
    "a UFO": ("flying saucer",),
    "an apple": ("red apple", "green apple"),
    "an aubergine": ("eggplant",),
    "a donut": ("doughnut",),
    "a burger": ("hamburger",),
    "a cup of coffee": ("hot beverage",),
    "a cottage": ("house", "hut"),
    "a tree": ("deciduous tree", "evergreen tree", "palm tree", "christmas tree"),
    "a flower": ("blossom", "hibiscus", "rose", "tulip", "sunflower", "hyacinth"),
    "the moon": ("full moon", "crescent moon"),
    "a flame": ("fire",),
    "a sneaker": ("running shoe",),
    "trousers": ("jeans",),
    "a hat": ("top hat", "billed cap"),
    "a phone": ("mobile phone", "telephone"),
    "a PC": ("desktop computer", "laptop"),
    "a fiddle": ("violin",),
    "a trash can": ("wastebasket",),
    "a present": ("wrapped gift",),
}


@dataclass(frozen=True)
class Prompt:
    """`wanted` holds, for each object from left to right, the nouns that are right."""

    text: str
    wanted: tuple[tuple[str, ...], ...]
    background: str | None = "white"  # None: any will do
    size: str | None = None  # a key of SIZES
    place: str | None = None  # a key of PLACES

    @property
    def is_pair(self) -> bool:
        return len(self.wanted) == 2


def vocabulary(bundle: Path) -> list[str]:
    """The nouns a bundle was trained on, from its own nouns.txt; the package's if it has none."""
    file = bundle / "nouns.txt"
    if not file.is_file():
        return nouns()
    names = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise RequestError(
            "model", f"{file}: needs at least two nouns, one a line, each once; export it again"
        )
    return names


def prompt_sets(names: Sequence[str]) -> dict[str, tuple[Prompt, ...]]:
    """Every set by name, in the order they are reported."""
    return {
        "nouns": tuple(Prompt(article(name), ((name,),)) for name in names),
        "colors": tuple(_on(name, _trained_color(name)) for name in names),
        "unseen-colors": tuple(_on(name, held_out_color(name)) for name in names),
        "pairs": tuple(_pairs(names)),
        "sizes": tuple(_sized(names)),
        "places": tuple(_placed(names)),
        "synonyms": tuple(_synonyms(names)),
    }


def select_sets(
    sets: Mapping[str, tuple[Prompt, ...]], chosen: Sequence[str] | None, sample: int | None
) -> dict[str, tuple[Prompt, ...]]:
    """The sets named, all by default; at most `sample` prompts of each, the same ones always."""
    if unknown := [name for name in chosen or () if name not in sets]:
        raise RequestError("sets", f"no set {unknown[0]!r}; choose of {', '.join(sets)}")
    picked = {name: sets[name] for name in sets if not chosen or name in chosen}
    if sample is None:
        return picked
    return {name: _sample(name, prompts, sample) for name, prompts in picked.items()}


def digest(sets: Mapping[str, Sequence[Prompt]]) -> str:
    """Sha256 of every text and of what counts as right."""
    values = {name: [list(vars(p).values()) for p in prompts] for name, prompts in sets.items()}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def noise_seed(text: str, seed: int) -> int:
    """Where the noise of a prompt's picture comes from: the prompt, so that it is the same
    whichever sets and samples are drawn, and `seed`, 0 to 2**32 - 1."""
    return seed << 32 | zlib.crc32(text.encode())


def real_scene(prompt: Prompt, names: Sequence[str], seed: int) -> Scene:
    """What a perfect picture of the prompt could be, composed as in training."""
    r = random.Random(f"{seed} {prompt.text}")
    background = prompt.background or r.choice(list(COLORS))
    objects = [names.index(r.choice(accepted)) for accepted in prompt.wanted]
    if prompt.is_pair:
        places = []
        for noun, x in zip(objects, (r.uniform(0.26, 0.29), r.uniform(0.71, 0.74)), strict=True):
            size = r.uniform(*PAIR_SIZE)
            places.append(Placement(noun, size, x, r.uniform(size / 2, 1 - size / 2)))
    else:
        sizes = SIZES[prompt.size] if prompt.size else PLACED_SIZE if prompt.place else PLAIN_SIZE
        size = r.uniform(*sizes)
        centre = PLACES[prompt.place] if prompt.place else (None, None)
        x, y = (near(r, value, size) for value in centre)
        places = [Placement(objects[0], size, x, y)]
    return Scene(tuple(places), background, prompt.text)


@cache
def _categories() -> dict[str, str]:
    text = files("gentron.train").joinpath("categories.toml").read_text("utf-8")
    return {noun: name for name, group in tomllib.loads(text).items() for noun in group}


def category(noun: str) -> str:
    """The group a noun is reported in."""
    return _categories().get(noun, OTHER)


def _on(name: str, color: str) -> Prompt:
    return Prompt(f"{article(name)} on {article(color)} background", ((name,),), color)


def _trained_color(name: str) -> str:
    seen = [color for color in COLORS if color not in ("white", held_out_color(name))]
    return random.Random(f"color {name}").choice(seen)


def _pairs(names: Sequence[str]) -> list[Prompt]:
    r, found = random.Random("pairs"), []
    for _ in range(NUM_PAIRS):
        left, right = r.sample(list(names), 2)
        a, b = article(left), article(right)
        verb = r.choice((*VERBS, None))
        text = f"{a} {verb} {b}" if verb else f"{a} on the left, {b} on the right"
        found.append(Prompt(text, ((left,), (right,))))
    return found


def _sized(names: Sequence[str]) -> list[Prompt]:
    chosen = random.Random("sizes").sample(list(names), min(NUM_SIZED, len(names)))
    return [
        Prompt(article(f"{size} {name}"), ((name,),), size=size)
        for name in chosen
        for size in SIZES
    ]


def _placed(names: Sequence[str]) -> list[Prompt]:
    chosen = random.Random("places").sample(list(names), min(NUM_PLACED, len(names)))
    words = [list(PLACES)[index % len(PLACES)] for index in range(len(chosen))]
    return [
        Prompt(f"{article(name)} {place}", ((name,),), place=place)
        for name, place in zip(chosen, words, strict=True)
    ]


def _synonyms(names: Sequence[str]) -> list[Prompt]:
    known = set(names)
    answers = {text: tuple(n for n in right if n in known) for text, right in SYNONYMS.items()}
    return [Prompt(text, (right,), None) for text, right in answers.items() if right]


def _sample(name: str, prompts: tuple[Prompt, ...], count: int) -> tuple[Prompt, ...]:
    rows = random.Random(f"sample {name}").sample(range(len(prompts)), min(count, len(prompts)))
    return tuple(prompts[row] for row in sorted(rows))
