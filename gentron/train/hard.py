"""What a model draws worst, by its own loss: for more training of just that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.errors import RequestError
from gentron.train.denoiser import FLOW_TIMESTEPS
from gentron.train.pools import LatentPool, embed, encode
from gentron.train.precision import mixed
from gentron.train.report import write_text
from gentron.train.scenes import Placement, Scene, article, draw
from gentron.train.text import FrozenText

# Where `missed` compares: what is drawn here comes from the caption, and the rest is detail.
MISSED_TIME = 0.95
MISSED_SIZES = (0.72, 0.9)  # of the picture's side, both in its centre
BATCH = 64


@torch.inference_mode()
def missed(
    forward: Callable[..., Tensor],
    autoencoder: torch.nn.Module,
    sprites: Tensor,
    names: Sequence[str],
    text: FrozenText,
    pool: LatentPool,
) -> Tensor:
    """How much of each noun `forward` misses with its caption: float32 [K], for K names.

    The squared error of its velocity at t = 0.95, over what sets the picture apart from an empty
    one; large and simple things have no advantage. All nouns meet the same noise.
    """
    device = sprites.device
    scenes = [
        Scene((Placement(noun, size, 0.5, 0.5),), "white", article(name))
        for noun, name in enumerate(names)
        for size in MISSED_SIZES
    ]
    mean, std = (value[:, None, None] for value in (pool.mean, pool.std))
    empty = (encode(autoencoder, draw([Scene((), "white", "")], sprites)) - mean) / std
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(empty.shape, generator=generator, device=device)
    shares = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        clean = (encode(autoencoder, draw(batch, sprites)) - mean) / std
        texts = embed(text, [scene.caption for scene in batch])
        t = torch.full((len(batch),), MISSED_TIME * FLOW_TIMESTEPS, device=device)
        noisy = torch.lerp(clean, noise.expand_as(clean), MISSED_TIME)[:, None]
        with mixed(device):
            velocity = forward(noisy, t, [texts["hidden"].float()], [texts["mask"]],
                               texts["pooled"].float())[:, 0].float()  # fmt: skip
        error, whole = (
            F.mse_loss(a, b.expand_as(a), reduction="none").mean((1, 2, 3))
            for a, b in ((velocity, noise - clean), (clean, empty))
        )
        shares.append(error / whole)
    return torch.cat(shares).view(len(names), len(MISSED_SIZES)).mean(1)


def hardest(
    file: Path, names: Sequence[str], count: int, measure: Callable[[], Tensor]
) -> list[int]:
    """The `count` nouns of which `measure()` [K] says most, kept in `file`, one a line: a run that
    is resumed goes on with the nouns that it began with.

    Raises RequestError if `file` holds another number of nouns, or words that are none.
    """
    if not file.is_file():
        worst = measure().argsort(descending=True)[:count].tolist()
        write_text(file, "".join(f"{names[noun]}\n" for noun in sorted(worst)))
    kept = file.read_text("utf-8").splitlines()
    places = {name: noun for noun, name in enumerate(names)}
    if strange := [name for name in kept if name not in places]:
        raise RequestError(
            "hard_nouns", f"{file}: {strange[0]!r} is no noun of the vocabulary; remove its folder"
        )  # fmt: skip
    if len(kept) != min(count, len(names)):
        raise RequestError(
            "hard_nouns", f"{file} has {len(kept)}: go on with --hard-nouns {len(kept)}, or choose "
            "another --run"
        )  # fmt: skip
    return [places[name] for name in kept]
