"""Every component's tensors: names, types and axes. Nobody else types a tensor name.

Export names its graphs from here, engines check their feeds against it, and the manifest carries
it. An axis is a number (fixed) or one of the letters of `AXES` (symbolic in every graph).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.errors import BundleError, RequestError

AXES = {
    "B": "samples",
    "R": "branch rows, 1 to 3 a sample",
    "F": "frames",
    "T": "rows of the modulation tables: one a (text, step)",
    "U": "distinct texts",
    "K": "frames decoded together",
    "h": "latent height",
    "w": "latent width",
    "H": "height in pixels",
    "W": "width in pixels",
}
# numpy's name of what a graph computes in, by the name that options and files give it; int8 is of
# an engine's weights only, whose graph is another
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "int8": "int8"}
COMPUTE = "compute"  # the graph's own type: float16, bfloat16 or float32
STATE_SLOTS = 3  # latents and two of solver memory
UPDATE_TERMS = 5  # the three slots, the prediction, the noise
MAX_BRANCHES = 3  # equation 6
MASKED = -1e4  # additive; exp underflows to exactly 0 in float16 and float32, without NaN rows

Axis = int | str


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str  # a numpy type name, or COMPUTE
    axes: tuple[Axis, ...]

    def numpy_dtype(self, compute: str) -> np.dtype[Any]:
        return np.dtype(compute if self.dtype == COMPUTE else self.dtype)


@dataclass(frozen=True)
class Component:
    """One exported graph: where it lives in a bundle and what goes in and out."""

    name: str
    folder: str
    stem: str  # the graph is FOLDER/STEM.PRECISION.onnx
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise AssertionError(f"{self.name} has no tensor {name}")

    def graph_file(self, precision: str) -> str:
        return f"{self.folder}/{self.stem}.{precision}.onnx"

    def to_dict(self) -> dict[str, Any]:
        return {key: asdict(self)[key] for key in ("inputs", "outputs")}

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size of every symbolic axis, from the inputs' shapes; raises RequestError when an
        input is missing, unknown, of the wrong rank, or disagrees with another."""
        names = {spec.name for spec in self.inputs}
        if set(shapes) != names:
            missing, extra = sorted(names - set(shapes)), sorted(set(shapes) - names)
            raise RequestError(self.name, f"inputs missing {missing}, unknown {extra}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = shapes[spec.name]
            if len(shape) != len(spec.axes):
                raise RequestError(
                    f"{self.name}.{spec.name}", f"expected axes {spec.axes}, got shape {shape}"
                )
            for axis, size in zip(spec.axes, shape, strict=True):
                expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
                if expected != size:
                    raise RequestError(
                        f"{self.name}.{spec.name}",
                        f"axis {axis} must be {expected}, got shape {shape}",
                    )
        return sizes


def text_encoder_name(index: int) -> str:
    """diffusers' names: text_encoder, text_encoder_2."""
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


def contract(config: GenTronConfig, vae_factor: int) -> dict[str, Component]:
    """All components of a model, in the order in which a request meets them."""
    components = [_text_encoder(config, index) for index in range(len(config.text))]
    if config.injection == "cross_attention":
        components.append(_text_projection(config))
    components += [_conditioner(config), _denoiser(config), _vae_decoder(config, vae_factor)]
    return {component.name: component for component in components}


def _text_encoder(config: GenTronConfig, index: int) -> Component:
    text, name = config.text[index], text_encoder_name(index)
    outputs = [TensorSpec("hidden", "float32", ("U", text.max_tokens, text.width))]
    if text.gives_pooled:
        outputs.append(TensorSpec("pooled", "float32", ("U", text.width)))
    return Component(
        name,
        folder=name,
        stem="model",
        inputs=(
            TensorSpec("input_ids", "int64", ("U", text.max_tokens)),
            TensorSpec("attention_mask", "int64", ("U", text.max_tokens)),
        ),
        outputs=tuple(outputs),
    )


def _text_tables(config: GenTronConfig) -> tuple[TensorSpec, ...]:
    tables: list[TensorSpec] = []
    if config.injection == "adaln":
        return ()
    for index, text in enumerate(config.text):
        blocks = len(config.text_blocks(index))
        kv = ("U", blocks, 2, config.heads, text.max_tokens, config.head_width)
        tables.append(TensorSpec(f"text_kv_{index + 1}", COMPUTE, kv))
        tables.append(TensorSpec(f"text_bias_{index + 1}", COMPUTE, ("U", 1, 1, text.max_tokens)))
    return tuple(tables)


def _text_projection(config: GenTronConfig) -> Component:
    inputs: list[TensorSpec] = []
    for index, text in enumerate(config.text):
        inputs += [
            TensorSpec(f"hidden_{index + 1}", "float32", ("U", text.max_tokens, text.width)),
            TensorSpec(f"mask_{index + 1}", "int64", ("U", text.max_tokens)),
        ]
    return Component(
        "text_projection",
        folder="transformer",
        stem="text_projection",
        inputs=tuple(inputs),
        outputs=_text_tables(config),
    )


def _modulation_tables(config: GenTronConfig) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec("modulation", COMPUTE, ("T", config.depth, 6, config.width)),
        TensorSpec("final_modulation", "float32", ("T", 2, config.width)),
    )


def _conditioner(config: GenTronConfig) -> Component:
    inputs = [TensorSpec("timesteps", "float32", ("T",))]
    if config.pooled_width:
        inputs.append(TensorSpec("pooled", "float32", ("T", config.pooled_width)))
    if config.size_conditioning:
        inputs.append(TensorSpec("size", "float32", ("T", 2)))  # height and width in pixels
    return Component(
        "conditioner",
        folder="transformer",
        stem="conditioner",
        inputs=tuple(inputs),
        outputs=_modulation_tables(config),
    )


def _denoiser(config: GenTronConfig) -> Component:
    latents: tuple[Axis, ...] = ("F", config.latent_channels, "h", "w")
    state = ("B", STATE_SLOTS, *latents)
    inputs = [
        TensorSpec("state", "float32", state),
        TensorSpec("row_sample", "int64", ("R",)),
        TensorSpec("row_modulation", "int64", ("R",)),
    ]
    if config.injection == "cross_attention":
        inputs.append(TensorSpec("row_text", "int64", ("R",)))
    if config.temporal:
        inputs.append(TensorSpec("row_motion_free", "bool", ("R",)))
    inputs += [
        TensorSpec("slots", "int64", ("B", MAX_BRANCHES)),
        TensorSpec("guidance", "float32", ("B", MAX_BRANCHES)),
        TensorSpec("update", "float32", ("B", STATE_SLOTS, UPDATE_TERMS)),
        TensorSpec("noise", "float32", ("B", *latents)),
        *_modulation_tables(config),
        *_text_tables(config),
    ]
    return Component(
        "denoiser",
        folder="transformer",
        stem="denoiser",
        inputs=tuple(inputs),
        outputs=(TensorSpec("next_state", "float32", state), TensorSpec("bad", "bool", ("B",))),
    )


def _vae_decoder(config: GenTronConfig, vae_factor: int) -> Component:
    if vae_factor < 1:
        raise BundleError(f"vae: factor must be at least 1, got {vae_factor}")
    return Component(
        "vae_decoder",
        folder="vae",
        stem="decoder",
        inputs=(TensorSpec("latents", "float32", ("K", config.latent_channels, "h", "w")),),
        outputs=(TensorSpec("pixels", "float32", ("K", 3, "H", "W")),),
    )


def check_feeds(
    component: Component, feeds: Mapping[str, npt.NDArray[Any]], compute: str
) -> dict[str, int]:
    """Shapes, types and contiguity of what is about to be bound; returns the axis sizes."""
    sizes = component.bind({name: array.shape for name, array in feeds.items()})
    for spec in component.inputs:
        array, dtype = feeds[spec.name], spec.numpy_dtype(compute)
        where = f"{component.name}.{spec.name}"
        if array.dtype != dtype:
            raise RequestError(where, f"expected {dtype}, got {array.dtype}")
        if not array.flags.c_contiguous:
            raise RequestError(where, "must be C-contiguous; pass np.ascontiguousarray(...)")
    return sizes
