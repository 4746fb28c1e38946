"""Any diffusers autoencoder with `decode`, seen from model latents."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from gentron.errors import BundleError

STATISTICS = ("latents_mean", "latents_std")  # per channel, as newer autoencoders spell them


def new_vae(config: dict[str, Any]) -> nn.Module:
    """The diffusers class that `_class_name` names, with this configuration."""
    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if kind is None or not hasattr(kind, "decode"):
        raise BundleError(
            f"vae/config.json: _class_name {name!r} is not a diffusers autoencoder with decode"
        )
    # Classes without these fields would ignore them, loudly; they are kept on the config instead.
    accepted = inspect.signature(kind.__init__).parameters
    extra = {key: config[key] for key in STATISTICS if key in config and key not in accepted}
    model = kind.from_config({key: value for key, value in config.items() if key not in extra})
    model.register_to_config(**extra)
    return model


class VaeDecoder(nn.Module):
    """Model latents [K, C, h, w] float32 -> pixels [K, 3, H, W] float32 in about [-1, 1].

    The scale comes from the autoencoder's own configuration: `latents_mean` and `latents_std` per
    channel where it has them, else `scaling_factor` and `shift_factor`.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        config = vae.config
        try:
            scale = float(config.get("scaling_factor") or 1.0)
            shift = float(config.get("shift_factor") or 0.0)
            self.std = [float(v) for v in config.get("latents_std") or [1 / scale]]
            self.mean = [float(v) for v in config.get("latents_mean") or [shift]]
        except (TypeError, ValueError) as error:
            raise BundleError(f"vae/config.json: a scale is no number ({error})") from error

    def forward(self, latents: Tensor) -> Tensor:
        std, mean = _per_channel(self.std), _per_channel(self.mean)
        dtype = next(self.vae.decoder.parameters()).dtype
        return self.vae.decode((latents * std + mean).to(dtype), return_dict=False)[0].float()


def _per_channel(values: list[float]) -> Tensor:
    """[C, 1, 1] float32, spelled so that a tracer sees numbers rather than a stored tensor."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32) for value in values])
