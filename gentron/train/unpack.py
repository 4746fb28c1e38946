"""A packaged model as the start of more training: its weights as finished runs of a folder."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gentron.bundle import locate
from gentron.errors import RequestError
from gentron.train.autoencoder import new_autoencoder
from gentron.train.checkpointing import Run
from gentron.train.denoiser import IMAGE_RUN
from gentron.train.pools import STATISTICS
from gentron.train.recipe import NOTES, Recipe
from gentron.train.video import NAME, is_temporal


def unpack(bundle: str, folder: Path, *, without_motion: bool = False) -> str:
    """Makes `folder` what it was when `bundle` had been trained, without its pools and optimizers.

    With `without_motion` there is an image run too, the video model less its temporal layers: the
    start of a training of new ones. It draws worse than the whole until it is trained.

    Returns the name of the run to go on from, the image run if there is one. Raises RequestError
    for a folder that already holds a training, for a bundle that this recipe has not made, and for
    an image model `without_motion`.
    """
    source = locate(bundle)
    if folder.exists() and any(folder.iterdir()):
        raise RequestError("folder", f"{folder}: not empty; choose another --folder, or remove it")
    provenance = _provenance(source)
    try:
        recipe = Recipe(**{f.name: provenance[f.name] for f in fields(Recipe)})
    except KeyError as error:
        raise RequestError(
            "model", f"{bundle}: not made by this recipe (its provenance has no {error}); "
            "choose a bundle of gentron-train emoji"
        ) from error  # fmt: skip
    vae = json.loads((source / "vae" / "config.json").read_text("utf-8"))
    autoencoder = new_autoencoder()
    autoencoder.load_state_dict(_tensors(source / "vae"))
    transformer = _tensors(source / "transformer")
    still = {name: value for name, value in transformer.items() if not is_temporal(name)}
    run = NAME if len(still) < len(transformer) else IMAGE_RUN
    if without_motion and run == IMAGE_RUN:
        raise RequestError(
            "model", f"{bundle}: an image model, it has no temporal layers; leave out "
            "--without-motion"
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    statistics = {"mean": vae["latents_mean"], "std": vae["latents_std"]}
    (folder / STATISTICS).write_text(json.dumps(statistics) + "\n", "utf-8")
    (folder / NOTES).write_text(json.dumps(vars(recipe), indent=1) + "\n", "utf-8")
    Run(folder, "autoencoder").save(
        {
            "model": autoencoder.state_dict(),
            "optimizer": torch.optim.Adam(autoencoder.parameters()).state_dict(),
            "step": recipe.autoencoder_images // recipe.autoencoder_batch,
        }
    )
    runs = {run: transformer, **({IMAGE_RUN: still} if without_motion else {})}
    for name, tensors in runs.items():
        Run(folder, name).save(
            {"step": 1, "steps": 1, "averaged": tensors, "provenance": provenance}
        )
    return IMAGE_RUN if without_motion else run


def _provenance(source: Path) -> dict[str, Any]:
    """Of a bundle or of a checkpoint."""
    for name in ("gentron.json", "checkpoint.json"):
        if (source / name).is_file():
            values = json.loads((source / name).read_text("utf-8"))
            return dict(values.get("provenance", {}))
    raise RequestError("model", f"{source}: neither a bundle nor a checkpoint")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every weight of a component in float32; the stored empty text is none."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        stored |= {name: value.float() for name, value in load_file(file).items()}
    return stored
