"""Pools of encoded pictures and clips with their captions: drawn once, kept in chunks."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gentron.errors import RequestError
from gentron.train.autoencoder import memory_format
from gentron.train.clips import FRAMES, Clip, ClipSampler, backwards, draw_clip
from gentron.train.precision import mixed
from gentron.train.scenes import Scene, SceneSampler, draw
from gentron.train.strangers import estranged, leanings
from gentron.train.text import FrozenText
from gentron.train.wording import wordings

STATISTICS = "latents.json"
SHOWN = "shown"  # file of a pool: what its first chunk shows, as a digest
# What is drawn, encoded and kept together.
CHUNK = 512  # scenes
CLIPS_CHUNK = 64  # clips


@dataclass(frozen=True)
class LatentPool:
    """Encoded pictures and captions: drawn once, since encoding costs more than a training step."""

    latents: Tensor  # [K, C, h, w] float16, normalised per channel
    mean: Tensor  # [C]
    std: Tensor  # [C]
    hidden: Tensor  # [K, L, W] float16
    mask: Tensor  # [K, L] int64
    pooled: Tensor  # [K, W] float16
    # Of the same captions with strange words for nouns; None: they never lean.
    strange_hidden: Tensor | None = None
    strange_pooled: Tensor | None = None


@dataclass(frozen=True)
class ClipPool:
    """Encoded clips and captions, normalised as the image model's latents are."""

    latents: Tensor  # [K, F, C, h, w] float16
    hidden: Tensor  # [K, L, W] float16
    mask: Tensor  # [K, L] int64
    pooled: Tensor  # [K, W] float16
    # Of the same captions with strange words for nouns; None: they never lean.
    strange_hidden: Tensor | None = None
    strange_pooled: Tensor | None = None


@dataclass(frozen=True)
class Backwards:
    """What clips of a pool show when they are run backwards."""

    rows: Tensor  # [P] int64, of the pool
    hidden: Tensor  # [P, L, W] float16
    mask: Tensor  # [P, L] int64
    pooled: Tensor  # [P, W] float16


@torch.inference_mode()
def build_pool(
    folder: Path,
    autoencoder: torch.nn.Module,
    sprites: Tensor,
    names: list[str],
    text: FrozenText,
    *,
    count: int,
    seed: int,
    only: Sequence[int] | None = None,
) -> LatentPool:
    """Draws and encodes `count` scenes in chunks, each saved, so that a stop loses one chunk.

    Of all nouns, or `only` of those at these places of `names`. On the device of the sprites, where
    the pool stays.
    """
    device = sprites.device

    def scenes_of(index: int) -> list[Scene]:
        sampler = SceneSampler(names, seed, only=only, known=wordings())
        sampler.reseed(f"pool {seed} {index}")
        return sampler.sample(CHUNK)

    def chunk(index: int) -> dict[str, Tensor]:
        scenes = scenes_of(index)
        pictures = (draw(scenes[k : k + 128], sprites) for k in range(0, CHUNK, 128))
        latents = torch.cat([encode(autoencoder, batch) for batch in pictures])
        captions = [scene.caption for scene in scenes]
        return {"latents": latents.half(), **embed_both(text, captions, f"{seed} {index}")}

    joined = chunked(folder / of_seed("pool", seed), count // CHUNK, chunk, device, scenes_of(0))
    raw = joined.pop("latents").float()
    mean, std = statistics(folder / STATISTICS, raw)
    normalised = (raw - mean[:, None, None]) / std[:, None, None]
    return LatentPool(latents=normalised.half(), mean=mean, std=std, **joined)


@torch.inference_mode()
def build_clip_pool(
    folder: Path,
    autoencoder: torch.nn.Module,
    sprites: Tensor,
    names: list[str],
    text: FrozenText,
    images: LatentPool,
    *,
    count: int,
    seed: int,
) -> ClipPool:
    """Draws and encodes `count` clips in chunks, each saved, so that a stop loses one chunk.

    On the device of the sprites, where the pool stays.
    """

    def chunk(index: int) -> dict[str, Tensor]:
        clips = _clips(names, seed, index)
        latents = []
        for start in range(0, CLIPS_CHUNK, 16):
            frames = torch.cat([draw_clip(c, sprites) for c in clips[start : start + 16]])
            latents.append(encode(autoencoder, frames).unflatten(0, (-1, FRAMES)))
        captions = [clip.caption for clip in clips]
        return {
            "latents": torch.cat(latents).half(),
            **embed_both(text, captions, f"clips {seed} {index}"),
        }

    first = _clips(names, seed, 0)
    joined = chunked(
        folder / of_seed("clips", seed), count // CLIPS_CHUNK, chunk, sprites.device, first
    )
    raw = joined.pop("latents").float()
    normalised = (raw - images.mean[:, None, None]) / images.std[:, None, None]
    return ClipPool(latents=normalised.half(), **joined)


@torch.inference_mode()
def build_backwards(
    folder: Path,
    names: list[str],
    text: FrozenText,
    *,
    count: int,
    seed: int,
    device: torch.device,
) -> Backwards:
    """The captions of the clips that `build_clip_pool` drew with this count and seed, backwards."""

    def chunk(index: int) -> dict[str, Tensor]:
        turned = [backwards(clip, names[clip.noun]) for clip in _clips(names, seed, index)]
        rows = [k for k, clip in enumerate(turned) if clip is not None]
        captions = [clip.caption for clip in turned if clip is not None]
        return {"rows": torch.tensor(rows) + index * CLIPS_CHUNK, **embed(text, captions)}

    first = _clips(names, seed, 0)
    joined = chunked(
        folder / of_seed("backwards", seed), count // CLIPS_CHUNK, chunk, device, first
    )
    return Backwards(**joined)


def _clips(names: list[str], seed: int, index: int) -> list[Clip]:
    sampler = ClipSampler(names, seed, known=wordings())
    sampler.reseed(f"clips {seed} {index}")
    return sampler.sample(CLIPS_CHUNK)


def of_seed(name: str, seed: int) -> str:
    """What a pool's folder is called: `pool`, `pool-3`."""
    return f"{name}-{seed}" if seed else name


def statistics(file: Path, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the first pool, kept in `file`: a network that goes on
    with another pool finds its latents as they were. raw [K, C, h, w] -> two of [C]."""
    if not file.exists():
        values = {"mean": raw.mean((0, 2, 3)).tolist(), "std": raw.std((0, 2, 3)).tolist()}
        file.write_text(json.dumps(values) + "\n", "utf-8")
    kept = json.loads(file.read_text("utf-8"))
    return (
        torch.tensor(kept["mean"], device=raw.device),
        torch.tensor(kept["std"], device=raw.device),
    )


def encode(autoencoder: torch.nn.Module, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] -> latents [B, C, h, w] float32."""
    pictures = pictures.contiguous(memory_format=memory_format(pictures.device))
    with mixed(pictures.device):
        return autoencoder.encode(pictures, return_dict=False)[0].float().contiguous()


def embed(text: FrozenText, captions: list[str]) -> dict[str, Tensor]:
    """Captions as a pool keeps them."""
    hidden, mask, pooled = text(captions)
    return {"hidden": hidden.half(), "mask": mask, "pooled": pooled.half()}


def embed_both(text: FrozenText, captions: list[str], seed: str) -> dict[str, Tensor]:
    """Captions as a pool keeps them, and the same with strange words for nouns."""
    ids, mask = text.encode(captions)
    hidden, pooled = text.states(estranged(text, ids, zlib.crc32(seed.encode())), mask)
    strange = {"strange_hidden": hidden.half(), "strange_pooled": pooled.half()}
    return {**embed(text, captions), **strange}


def chunked(
    folder: Path,
    count: int,
    make: Callable[[int], dict[str, Tensor]],
    device: torch.device,
    first: Sequence[Scene | Clip],
) -> dict[str, Tensor]:
    """Chunks 0 to `count`, joined; each is read from `folder` or made and kept there.

    `first` is what chunk 0 shows. Raises RequestError for a folder whose chunks show anything else,
    as those of another seed do, and of another version that draws other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = folder / SHOWN
    digest = hashlib.sha256(repr(list(first)).encode()).hexdigest()
    if not any(folder.glob("*.pt")):
        shown.write_text(digest + "\n", "utf-8")
    elif not shown.is_file() or shown.read_text("utf-8").strip() != digest:
        raise RequestError(
            "folder", f"{folder}: drawn with another seed or by another version; remove it, and it "
            "is drawn anew, or choose another --folder"
        )  # fmt: skip
    chunks = []
    for index in range(count):
        file = folder / f"{index:04}.pt"
        if file.exists():
            chunks.append(torch.load(file, map_location=device, weights_only=True))
            continue
        chunks.append(make(index))
        torch.save(chunks[-1], file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return {key: torch.cat([chunk.pop(key) for chunk in chunks]) for key in list(chunks[0])}


Texts = TypeVar("Texts", LatentPool, ClipPool, Backwards)


def without_padding(pool: Texts, tokens: int) -> Texts:
    """The pool with its captions cut to so many tokens; see `longest`."""
    cut = {"hidden": pool.hidden[:, :tokens], "mask": pool.mask[:, :tokens]}
    if not isinstance(pool, Backwards) and pool.strange_hidden is not None:
        cut["strange_hidden"] = pool.strange_hidden[:, :tokens]
    return replace(pool, **cut)


def longest(*pools: LatentPool | ClipPool | Backwards | None) -> int:
    """Tokens of the longest caption of all pools, rounded up to a multiple of 8."""
    tokens = max(int(pool.mask.sum(1).max()) for pool in pools if pool is not None)
    return -(-tokens // 8) * 8


def captions(
    pool: LatentPool | ClipPool,
    rows: Tensor,
    drop: Tensor,
    null: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, masks and pooled states of these rows, the empty text's where `drop` [R];
    some on their way to strange words, by lot."""
    hidden, mask, pooled = pool.hidden[rows].float(), pool.mask[rows], pool.pooled[rows].float()
    if pool.strange_hidden is not None and pool.strange_pooled is not None:
        lean = leanings(len(rows), generator)
        hidden = hidden.lerp(pool.strange_hidden[rows].float(), lean[:, None, None])
        pooled = pooled.lerp(pool.strange_pooled[rows].float(), lean[:, None])
    hidden, mask, pooled = (
        torch.where(drop.view(-1, *[1] * (value.ndim - 1)), empty, value)
        for value, empty in zip((hidden, mask, pooled), null, strict=True)
    )
    return hidden, mask, pooled
