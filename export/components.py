"""The torch module behind each component of the contract, with the contract's flat signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gentron.config import GenTronConfig
from gentron.contract import Component, contract, text_encoder_name
from gentron.latents import vae_factor
from gentron.model.conditioning import Conditioner, TextProjection
from gentron.model.denoiser import Denoiser
from gentron.model.text_encoder import TextEncoder, encoder_config
from gentron.model.vae import VaeDecoder, new_vae

TRANSFORMER, VAE = "transformer", "vae"


@dataclass(frozen=True)
class Source:
    """What there is to export, without its tensors: configurations of every part."""

    config: GenTronConfig
    encoders: tuple[dict[str, Any], ...]  # transformers configurations
    vae: dict[str, Any]  # diffusers configuration
    scheduler: dict[str, Any]

    @property
    def components(self) -> dict[str, Component]:
        return contract(self.config, vae_factor(self.vae))


@dataclass(frozen=True)
class Part:
    """How a component is built and where its weights are: parameter `inner.x` of the module is
    tensor `stored.x` of the folder, for the pair (inner, stored) in `prefixes`."""

    component: Component
    build: Callable[[], nn.Module]
    prefixes: tuple[str, str]
    side_unit: int = 1

    def stored_name(self, parameter: str) -> str:
        inner, stored = self.prefixes
        assert parameter.startswith(inner), parameter
        return stored + parameter.removeprefix(inner)


class TextProjectionGraph(nn.Module):
    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.projection = TextProjection(config)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """hidden_1, mask_1, ... -> text_kv_1, text_bias_1, ..."""
        tables = self.projection(list(inputs[0::2]), list(inputs[1::2]))
        return tuple(tensor for table in tables for tensor in table)


class ConditionerGraph(Conditioner):
    """timesteps and whatever else the model is conditioned on, in the contract's order."""

    def __init__(self, config: GenTronConfig, component: Component):
        super().__init__(config)
        self.names = [spec.name for spec in component.inputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        modulation, final = super().forward(**dict(zip(self.names, inputs, strict=True)))
        return modulation, final


class DenoiserGraph(nn.Module):
    def __init__(self, config: GenTronConfig, component: Component):
        super().__init__()
        self.denoiser = Denoiser(config)
        self.names = [spec.name for spec in component.inputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(self.names, inputs, strict=True))
        tables = sum(name.startswith("text_kv_") for name in self.names)
        text_tables = [
            (named.pop(f"text_kv_{i + 1}"), named.pop(f"text_bias_{i + 1}")) for i in range(tables)
        ]
        absent = {"row_text": None, "row_motion_free": None}
        next_state, bad = self.denoiser(**{**absent, **named}, text_tables=text_tables)
        return next_state, bad


def parts(source: Source) -> dict[str, Part]:
    """Every component of the source, in the contract's order."""
    config, components = source.config, source.components
    found: dict[str, Part] = {}
    for index, values in enumerate(source.encoders):
        name = text_encoder_name(index)
        found[name] = Part(
            components[name],
            partial(_text_encoder, config, index, values),
            prefixes=("model.", ""),
        )
    if "text_projection" in components:
        found["text_projection"] = Part(
            components["text_projection"],
            lambda: TextProjectionGraph(config),
            prefixes=("projection.", "text_projection."),
        )
    found["conditioner"] = Part(
        components["conditioner"],
        lambda: ConditionerGraph(config, components["conditioner"]),
        prefixes=("", "conditioner."),
    )
    found["denoiser"] = Part(
        components["denoiser"],
        lambda: DenoiserGraph(config, components["denoiser"]),
        prefixes=("denoiser.", "denoiser."),
        side_unit=config.patch,
    )
    found["vae_decoder"] = Part(
        components["vae_decoder"],
        lambda: VaeDecoder(new_vae(source.vae)),
        prefixes=("vae.", ""),
    )
    return found


def _text_encoder(config: GenTronConfig, index: int, values: dict[str, Any]) -> TextEncoder:
    encoder = TextEncoder(config.text[index], encoder_config(values))
    if config.text[index].family == "t5":
        # T5's residual stream and `wo` leave float16's range: both stay float32 in every graph.
        for module in encoder.modules():
            if isinstance(wo := getattr(module, "wo", None), nn.Linear):
                module.wo = nn.Linear(
                    wo.in_features, wo.out_features, bias=False, dtype=torch.float32
                )
    return encoder
