"""Temporal layers for a checkpoint of pictures: a video model whose frames are separate pictures.

The output projection of a fresh temporal layer is zero (paper, section 3.3.1), so the layer changes
nothing until it is trained: F frames are F pictures, exactly. That makes a bundle of the right
shape, size and speed, and no motion.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from gentron.errors import RequestError
from gentron.export.components import TRANSFORMER
from gentron.export.source import Origin
from gentron.model.gentron import random_values

FRAMES, MAX_FRAMES = 8, 64  # section 4.1 trains on 8; as the video presets
TEMPORAL = re.compile(r"\.blocks\.\d+\.temporal\.(\w+)\.(weight|bias)$")


def with_temporal_layers(origin: Origin) -> Origin:
    """The same model with untrained temporal self-attention in every block.

    Queries, keys and values are seeded random numbers, outputs are zero, and the norms of heads, if
    there are any, are the identity. Raises RequestError for a model that has such layers already.
    """
    config = origin.source.config
    if config.temporal:
        raise RequestError(
            "video", f"{origin.name} has temporal layers already; export it without --video"
        )
    video = replace(config, temporal=True, sample_frames=FRAMES, max_frames=MAX_FRAMES)

    def read(folder: str, name: str, shape: tuple[int, ...]) -> Tensor:
        fresh = TEMPORAL.search(name) if folder == TRANSFORMER else None
        if fresh is None:
            return origin.read(folder, name, shape)
        layer, kind = fresh.groups()
        if layer == "to_out" or kind == "bias":
            return torch.zeros(shape)
        if layer.startswith("norm_"):
            return torch.ones(shape)
        return random_values(name, shape, zlib.crc32(name.encode()))

    said = (
        f"temporal layers are added with zero outputs: {FRAMES} frames are {FRAMES} separate "
        "pictures, good for shape and speed, not for motion"
    )
    return replace(
        origin,
        source=replace(origin.source, config=video),
        read=read,
        fingerprint=origin.fingerprint | {"video": True},
        provenance=origin.provenance | {"temporal layers": "untrained, with zero outputs"},
        notes=(*origin.notes, said),
    )
