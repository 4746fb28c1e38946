"""Captioned pictures of emoji, composed on the fly: the training data of the `emoji` checkpoint.

A scene is one or two sprites on a plain background together with a caption that describes it.
Sprites come from the Noto Color Emoji font (SIL OFL 1.1), their names from the `emoji` package.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from gentron.errors import RequestError
from gentron.train.wording import Namer, Wording

SPRITE_SIDE = 128  # pixels
BITMAP_STRIKE = 109  # the only bitmap size in NotoColorEmoji.ttf
FONT_LOCATIONS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)
COLORS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (150, 150, 150),
    "red": (214, 40, 40),
    "orange": (247, 147, 30),
    "yellow": (252, 220, 70),
    "green": (60, 160, 75),
    "blue": (40, 90, 200),
    "sky blue": (135, 206, 235),
    "purple": (130, 60, 170),
    "pink": (250, 170, 200),
    "brown": (120, 75, 45),
}
# Where one thing can be asked for: (x, y) of its centre, None for anywhere.
PLACES: dict[str, tuple[float | None, float | None]] = {
    "on the left": (0.28, None),
    "on the right": (0.72, None),
    "at the top": (None, 0.28),
    "at the bottom": (None, 0.72),
    "in the top left corner": (0.28, 0.28),
    "in the top right corner": (0.72, 0.28),
    "in the bottom left corner": (0.28, 0.72),
    "in the bottom right corner": (0.72, 0.72),
}
PLACED_SIZE = (0.42, 0.55)
# What captions call a thing of such a side, as a share of the picture's.
SIZE_WORDS = {"small": (0.35, 0.5), "tiny": (0.3, 0.4), "big": (0.85, 1.0), "huge": (0.95, 1.1)}
VERBS = ("reading", "holding", "looking at", "carrying", "with", "near", "beside", "next to", "and")


def nouns() -> list[str]:
    """The vocabulary: English names of the `emoji` package, one a line in `nouns.txt`."""
    return files("gentron.train").joinpath("nouns.txt").read_text("utf-8").split("\n")[:-1]


def find_font(path: Path | None = None) -> Path:
    """The colour emoji font; raises RequestError with the package to install if there is none."""
    for candidate in (path,) if path else FONT_LOCATIONS:
        if candidate.is_file():
            return candidate
    raise RequestError(
        "font",
        f"NotoColorEmoji.ttf was not found at {path or ', '.join(map(str, FONT_LOCATIONS))}; "
        "install it (Debian: apt-get install fonts-noto-color-emoji) or pass --font FILE",
    )


def load_sprites(font: Path, names: Sequence[str]) -> torch.Tensor:
    """Draws each name's glyph: premultiplied RGBA float32 in [0, 1], [K, 4, 128, 128]."""
    import emoji

    glyphs: dict[str, str] = {}
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            glyphs.setdefault(data["en"].strip(":").replace("_", " ").lower(), character)
    typeface = ImageFont.truetype(str(font), BITMAP_STRIKE)
    return torch.stack([_sprite(typeface, glyphs[name]) for name in names])


def _sprite(typeface: ImageFont.FreeTypeFont, glyph: str) -> torch.Tensor:
    canvas = Image.new("RGBA", (192, 192))
    ImageDraw.Draw(canvas).text((24, 24), glyph, font=typeface, embedded_color=True)
    ink = canvas.crop(canvas.getbbox()).convert("RGBa")
    scale = (SPRITE_SIDE - 12) / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    ink = ink.resize(size, Image.Resampling.LANCZOS)
    sprite = Image.new("RGBa", (SPRITE_SIDE, SPRITE_SIDE))
    sprite.paste(ink, ((SPRITE_SIDE - ink.width) // 2, (SPRITE_SIDE - ink.height) // 2))
    flat = torch.frombuffer(bytearray(sprite.tobytes()), dtype=torch.uint8)
    return flat.view(SPRITE_SIDE, SPRITE_SIDE, 4).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Placement:
    """One sprite in the picture: side and centre as fractions of the picture's side."""

    noun: int
    size: float
    x: float
    y: float
    angle: float = 0.0  # radians, clockwise


@dataclass(frozen=True)
class Scene:
    placements: tuple[Placement, ...]
    background: str
    caption: str


def draw(scenes: Sequence[Scene], sprites: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1], float32 [B, 3, 128, 128], on the device of the sprites."""
    device = sprites.device
    colors = torch.tensor([COLORS[scene.background] for scene in scenes], device=device) / 255
    picture = colors[:, :, None, None].expand(-1, -1, SPRITE_SIDE, SPRITE_SIDE)
    for layer in range(max(len(scene.placements) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.placements) > layer]
        places = [scenes[i].placements[layer] for i in rows]
        inverse = torch.tensor([_inverse(place) for place in places], device=device)
        chosen = sprites[torch.tensor([p.noun for p in places], device=device)]
        # Shrinking below half would alias under bilinear sampling, so average first.
        small = torch.tensor([p.size < 0.6 for p in places], device=device)[:, None, None, None]
        smooth = F.avg_pool2d(chosen, 3, stride=1, padding=1)
        grid = F.affine_grid(inverse, list(chosen.shape), align_corners=False)
        layer_rgba = F.grid_sample(
            torch.where(small, smooth, chosen), grid, mode="bilinear", align_corners=False
        )
        rgb, alpha = layer_rgba[:, :3], layer_rgba[:, 3:]
        picture, index = picture.clone(), torch.tensor(rows, device=device)
        picture[index] = picture[index] * (1 - alpha) + rgb
    return picture * 2 - 1


def _inverse(place: Placement) -> list[list[float]]:
    """From the picture's coordinates (-1 to 1) to the sprite's, as `affine_grid` takes it."""
    cos, sin = math.cos(place.angle) / place.size, math.sin(place.angle) / place.size
    x, y = 2 * place.x - 1, 2 * place.y - 1
    return [[cos, sin, -cos * x - sin * y], [-sin, cos, sin * x - cos * y]]


def held_out_color(noun: str) -> str:
    """The background this noun never gets in training: kept for scoring unseen pairs."""
    names = [name for name in COLORS if name != "white"]
    return names[zlib.crc32(noun.encode()) % len(names)]


def is_plural(noun: str) -> bool:
    return noun == "skis" or (noun.endswith("s") and noun[-2] not in "suio")


def article(phrase: str) -> str:
    """`cat` -> `a cat`, `orange door` -> `an orange door`, `books` -> `books`."""
    if is_plural(phrase):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "euro"))
    return f"{'an' if vowel else 'a'} {phrase}"


def near(r: random.Random, centre: float | None, size: float) -> float:
    """A coordinate close to `centre`, or anywhere that keeps a thing of this size inside."""
    if centre is not None:
        return centre + r.uniform(-0.02, 0.02)
    slack = max(0.0, 1 - size) / 2
    return 0.5 + r.uniform(-slack, slack)


class SceneSampler:
    """Draws scenes from a seeded stream.

    `only` are the nouns that scenes may show, as places in `names`: all if it is None. `known` is
    what else captions may call them.
    """

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        *,
        pairs: float = 0.4,
        only: Sequence[int] | None = None,
        known: Mapping[str, Wording] | None = None,
    ):
        self.names = list(names)
        self.namer = Namer(known or {}, seed)
        self.pairs = pairs
        self.shown: Sequence[int] = range(len(self.names)) if only is None else list(only)
        self.random = random.Random(seed)

    def reseed(self, seed: str) -> None:
        self.random.seed(seed)
        self.namer.reseed(seed)

    def sample(self, count: int) -> list[Scene]:
        return [
            self.pair() if self.random.random() < self.pairs else self.single()
            for _ in range(count)
        ]

    def _background(self, *nouns_in_scene: str) -> str:
        if self.random.random() < 0.3:
            return "white"
        forbidden = {held_out_color(noun) for noun in nouns_in_scene}
        return self.random.choice([name for name in COLORS if name not in forbidden])

    def _with_background(self, subject: str, background: str) -> str:
        if background == "white" and self.random.random() < 0.7:
            return subject
        form = self.random.choice(("{} on {a} background", "{}, {} background", "{} on {}"))
        return form.format(subject, background, a=article(background))

    def single(self) -> Scene:
        r = self.random
        noun = self.shown[r.randrange(len(self.shown))]
        name = self.names[noun]
        background = self._background(name)
        called = self.namer.name(name)
        subject = article(called) if r.random() < 0.75 else called
        size, where = r.uniform(0.65, 0.95), (None, None)
        kind = r.random()
        if kind < 0.12:
            word, (low, high) = r.choice(list(SIZE_WORDS.items()))
            subject, size = article(f"{word} {called}"), r.uniform(low, high)
        elif kind < 0.22:
            words = r.choice(list(PLACES))
            subject, size, where = f"{subject} {words}", r.uniform(*PLACED_SIZE), PLACES[words]
        x, y = (near(r, centre, size) for centre in where)
        place = Placement(noun, size, x, y)
        return Scene((place,), background, self._with_background(subject, background))

    def pair(self) -> Scene:
        r = self.random
        left, right = r.sample(self.shown, 2)
        background = self._background(self.names[left], self.names[right])
        places = tuple(
            Placement(noun, size := r.uniform(0.5, 0.58), x, r.uniform(size / 2, 1 - size / 2))
            for noun, x in ((left, r.uniform(0.26, 0.29)), (right, r.uniform(0.71, 0.74)))
        )
        a, b = (article(self.namer.name(self.names[noun])) for noun in (left, right))
        if r.random() < 0.25:
            subject = f"{a} on the left, {b} on the right"
        else:
            subject = f"{a} {r.choice(VERBS)} {b}"
        return Scene(places, background, self._with_background(subject, background))
