"""Does a model draw what it was asked for? Prompt sets, judged by the template scorer.

The same sets go through pictures whose answer is known: real renderings (what the scorer gets
right), real renderings through the model's own autoencoder (what any denoiser could reach), noise
and pictures of another prompt (what it gives away). A score means something between those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from gentron.train.prompts import (
    HUGE_ABOVE,
    OFF_PLACE,
    SMALL_BELOW,
    Prompt,
    category,
    real_scene,
)
from gentron.train.scenes import PLACES, SPRITE_SIDE, draw
from gentron.train.scorer import Sighting, TemplateScorer

# What is asked of the pictures of each set; the first is the set's headline.
CHECKS = {
    "nouns": ("object", "first five", "background"),
    "colors": ("all", "object", "background"),
    "unseen-colors": ("all", "object", "background"),
    "pairs": ("object", "one of two", "in order"),
    "sizes": ("size", "object", "all"),
    "places": ("all", "place", "object"),
    "synonyms": ("object", "first five"),
}
CHECKS_OF_ALL = (
    "object", "one of two", "in order", "first five", "background", "size", "place", "all",
)  # fmt: skip
BY_CATEGORY = ("nouns", "colors", "unseen-colors")  # one noun in each prompt
GENERATED, OTHER_PROMPT = "generated", "other prompt's"
CHUNK = 32  # pictures drawn or decoded together

Artist = Callable[[Sequence[Prompt]], Iterable[Tensor]]  # pictures [3, H, W] in [0, 1], in order
Watch = Callable[[str, str, int, int], None]  # (set, pictures of what, done, of)


@dataclass(frozen=True)
class Verdict:
    """What was asked, what was seen, and which of it is right."""

    prompt: Prompt
    ranks: tuple[int, ...]  # of each object asked for, 0 = first choice
    saw: tuple[str, ...]  # first choices, left to right
    background: str
    size: float  # of the only object, as `Placement.size`
    distance: float  # to the objects asked for, the farther one
    checks: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what was asked, what was seen, what of it is right."""
        asked = self.prompt
        return {
            "prompt": asked.text,
            "wanted": asked.wanted,
            "background": asked.background,
            "size": asked.size,
            "place": asked.place,
            "saw": self.saw,
            "saw_background": self.background,
            "saw_size": round(self.size, 3),
            "ranks": self.ranks,
            "distance": round(self.distance, 3) if math.isfinite(self.distance) else None,
            "right": [name for name in CHECKS_OF_ALL if self.checks[name]],
        }


@dataclass(frozen=True)
class SetScore:
    """One prompt set, by what the pictures were."""

    name: str
    verdicts: Mapping[str, tuple[Verdict, ...]]  # by column; GENERATED is the model's

    @property
    def count(self) -> int:
        return len(self.verdicts[GENERATED])

    def shares(self, column: str = GENERATED) -> dict[str, float]:
        """Of the pictures of a column, by check, in the order of CHECKS."""
        return shares(self.name, self.verdicts[column])


def shares(set_name: str, verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {
        check: sum(v.checks[check] for v in verdicts) / len(verdicts) for check in CHECKS[set_name]
    }


def score_sets(
    scorer: TemplateScorer,
    sets: Mapping[str, tuple[Prompt, ...]],
    model: Callable[[str], Artist],
    known: Mapping[str, Artist],
    watch: Watch = lambda name, column, done, of: None,
) -> tuple[SetScore, ...]:
    """Every set through the model (`model` gives its artist for a set) and through `known`."""
    found = []
    for name, prompts in sets.items():
        verdicts = {}
        for column, artist in (*known.items(), (GENERATED, model(name))):
            seen = []
            for prompt, picture in zip(prompts, artist(prompts), strict=True):
                seen.append(see(scorer, prompt, picture))
                watch(name, column, len(seen), len(prompts))
            verdicts[column] = judge_all(scorer.names, prompts, seen)
            if column == GENERATED:
                # An odd step, so that small never meets small where the two alternate.
                step = len(prompts) // 2 | 1
                verdicts[OTHER_PROMPT] = judge_all(
                    scorer.names, prompts, seen[step % len(seen) :] + seen[: step % len(seen)]
                )
        found.append(SetScore(name, verdicts))
    return tuple(found)


def see(scorer: TemplateScorer, prompt: Prompt, picture: Tensor) -> tuple[Sighting, ...]:
    """One sighting for each object asked for."""
    return scorer.look_at_pair(picture) if prompt.is_pair else (scorer.look(picture),)


def judge_all(
    names: Sequence[str], prompts: Sequence[Prompt], seen: Sequence[tuple[Sighting, ...]]
) -> tuple[Verdict, ...]:
    return tuple(judge(names, p, sightings) for p, sightings in zip(prompts, seen, strict=True))


def judge(names: Sequence[str], prompt: Prompt, sightings: tuple[Sighting, ...]) -> Verdict:
    """Holds one picture's sightings against what its prompt asked for."""
    ranks = [sighting.ranks() for sighting in sightings]
    rows = [[names.index(noun) for noun in accepted] for accepted in prompt.wanted]
    straight, crossed = _ranks(ranks, rows), _ranks(ranks[::-1], rows)
    best, order = straight, sightings
    if _goodness(crossed) > _goodness(straight):
        best, order = crossed, sightings[::-1]
    first, size = sightings[0], sightings[0].size
    checks = {
        "object": all(rank == 0 for rank in best),
        "one of two": any(rank == 0 for rank in best),
        "in order": all(rank == 0 for rank in straight),
        "first five": all(rank < 5 for rank in best),
        "background": prompt.background in (None, first.background),
        "size": {None: True, "small": 0 < size < SMALL_BELOW, "huge": size > HUGE_ABOVE}[
            prompt.size
        ],
        "place": prompt.place is None or at_place(first, prompt.place),
    }
    checks["all"] = all(checks[name] for name in ("object", "background", "size", "place"))
    distance = max(
        float(s.distances[r].min()) for s, r in zip(order, rows, strict=True)
    )  # fmt: skip
    saw = tuple(sighting.first_choice(names) for sighting in sightings)
    return Verdict(prompt, best, saw, first.background, size, distance, checks)


def at_place(seen: Sighting, place: str) -> bool:
    """Whether the middle of what is seen lies where PLACES says, within OFF_PLACE."""
    found = zip((seen.x, seen.y), PLACES[place], strict=True)
    off = [abs(value - wanted) for value, wanted in found if wanted is not None]
    return not seen.is_empty and max(off) <= OFF_PLACE


def _ranks(ranks: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(int(rank[row].min()) for rank, row in zip(ranks, rows, strict=True))


def _goodness(ranks: tuple[int, ...]) -> tuple[int, int]:
    return sum(rank == 0 for rank in ranks), -sum(ranks)


def by_category(result: SetScore) -> dict[str, tuple[int, dict[str, float]]]:
    """Category -> number of pictures and shares; of a set with one noun in each prompt."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in result.verdicts[GENERATED]:
        groups.setdefault(category(verdict.prompt.wanted[0][0]), []).append(verdict)
    return {name: (len(group), shares(result.name, group)) for name, group in groups.items()}


def worst(results: Iterable[SetScore], count: int) -> list[tuple[str, int]]:
    """(set, row) of the generated pictures farthest from what was asked: by rank, then distance."""
    found = [
        (max(verdict.ranks), verdict.distance, result.name, row)
        for result in results
        for row, verdict in enumerate(result.verdicts[GENERATED])
    ]
    return [(name, row) for _, _, name, row in sorted(found, key=lambda f: (-f[0], -f[1]))[:count]]


def real(sprites: Tensor, names: Sequence[str], seed: int) -> Artist:
    """True pictures of what the prompts ask for, at sizes and places no template was made at."""

    def render(prompts: Sequence[Prompt]) -> Iterator[Tensor]:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            yield from (draw([real_scene(p, names, seed) for p in chunk], sprites) + 1) / 2

    return render


def blurred(artist: Artist, sigma: float) -> Artist:
    """The same pictures as soft as an autoencoder makes them; `sigma` in pixels."""
    reach = int(3 * sigma + 1)
    x = torch.arange(-reach, reach + 1).float()
    kernel = (-(x**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)

    def soften(picture: Tensor) -> Tensor:
        wide = F.pad(picture[None], (reach,) * 4, mode="replicate")
        return F.conv2d(
            F.conv2d(wide, kernel[:, :, None], groups=3), kernel[..., None], groups=3
        )[0]  # fmt: skip

    return lambda prompts: (soften(picture) for picture in artist(prompts))


def reconstructed(artist: Artist, autoencoder: nn.Module) -> Artist:
    """The same pictures, encoded and decoded again: the best that any denoiser could do."""

    def rebuild(prompts: Sequence[Prompt]) -> Iterator[Tensor]:
        for start in range(0, len(prompts), CHUNK):
            pictures = torch.stack([*artist(prompts[start : start + CHUNK])])
            with torch.inference_mode():
                latents = autoencoder.encode(pictures * 2 - 1, return_dict=False)[0]
                pixels = autoencoder.decode(latents, return_dict=False)[0]
            yield from (pixels.clamp(-1, 1) + 1) / 2

    return rebuild


def noise(seed: int) -> Artist:
    """Pictures of nothing: what the scorer gives away for free."""
    generator = torch.Generator().manual_seed(seed)
    side = SPRITE_SIDE
    return lambda prompts: (torch.rand(3, side, side, generator=generator) for _ in prompts)


def autoencoder_of(bundle: Path) -> nn.Module | None:
    """The bundle's autoencoder with its encoder, in float32; None unless it maps pictures to
    latents without chance, as `AutoencoderDC` does."""
    from gentron.model.vae import new_vae

    config = json.loads((bundle / "vae" / "config.json").read_text("utf-8"))
    if config.get("_class_name") != "AutoencoderDC":
        return None
    autoencoder = new_vae(config).float()
    stored: dict[str, Tensor] = {}
    for file in sorted((bundle / "vae").glob("*.safetensors")):
        stored |= {name: value.float() for name, value in load_file(file).items()}
    autoencoder.load_state_dict(stored)
    return autoencoder.eval()
