"""What moves the weights: Muon for the matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

MUON, ADAMW = "muon", "adamw"
OPTIMIZERS = (MUON, ADAMW)
DECAY = 0.01
# Matrices between hidden states, those of a text encoder too. Muon makes all directions of a
# step equally long, so that what few examples ask for counts as well as what all do
# (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
HIDDEN = ("denoiser.blocks.", "text_projection.encoders.")


def optimizers(model: nn.Module, kind: str) -> list[Optimizer]:
    """Those that train `model`, for `step_all`. One learning rate suits both kinds: Muon's steps
    are as long as AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2)."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.ndim == 2 and name.startswith(HIDDEN)]
    chosen = {id(p) for p in hidden} if kind == MUON else set()
    rest = [p for p in named.values() if id(p) not in chosen]
    found: list[Optimizer] = [
        torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=DECAY, fused=True)
    ]
    if kind == MUON:
        found.append(torch.optim.Muon(hidden, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"))
    return found


def step_all(found: Sequence[Optimizer], rate: float) -> None:
    """One step of each, at this learning rate."""
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
