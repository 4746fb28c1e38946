"""Golden probes: inputs that any machine can make again, and the outputs they must give.

Inputs are a function of a seed (the noise function), so only torch's float32 outputs are stored,
and any engine anywhere can be checked without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.contract import COMPUTE, MASKED, Component, TensorSpec
from gentron.errors import BundleError
from gentron.noise import normal

Array = npt.NDArray[Any]
TABLE_SCALE = 0.25  # of modulation rows: about what trained conditioners give
CASES = "cases"
MOST_TOKENS = 4096  # over all rows and frames of a probe

# Which axis bounds an index input.
INDEX_AXES = {"row_sample": "B", "row_modulation": "T", "row_text": "U", "slots": "R"}


@dataclass(frozen=True)
class ProbeCase:
    """One set of inputs by its seed and axis sizes."""

    seed: int
    sizes: dict[str, int]
    token_ids: tuple[tuple[int, ...], ...] = ()  # for text encoders: real prompts, U rows
    token_mask: tuple[tuple[int, ...], ...] = ()


def probe_inputs(component: Component, case: ProbeCase) -> dict[str, Array]:
    """The case's inputs: float tensors float32, rounded so that float16 holds them exactly."""
    return {
        spec.name: _input(spec, case, index) for index, spec in enumerate(component.inputs)
    }  # fmt: skip


def in_compute_type(
    component: Component, inputs: dict[str, Array], compute: str
) -> dict[str, Array]:
    """The same inputs in the types of a graph that computes in `compute`."""
    return {
        spec.name: np.ascontiguousarray(inputs[spec.name].astype(spec.numpy_dtype(compute)))
        for spec in component.inputs
    }


def _input(spec: TensorSpec, case: ProbeCase, index: int) -> Array:
    shape = tuple(case.sizes[a] if isinstance(a, str) else a for a in spec.axes)
    values: Array = normal(case.seed, index, 1, shape)[0]
    if spec.name == "input_ids":
        return np.asarray(case.token_ids, np.int64)
    if spec.name == "attention_mask":
        return np.asarray(case.token_mask, np.int64)
    if spec.dtype == "bool":
        return np.asarray(values > 0)
    if spec.name in INDEX_AXES:
        values = np.abs(values) * 1000 // 1 % case.sizes[INDEX_AXES[spec.name]]
    elif spec.name == "timesteps":
        values = 1000 / (1 + np.exp(-2 * values))
    elif spec.name == "size":
        values = 64 * (1 + np.abs(values) * 1000 // 1 % 16)  # 64 to 1024 pixels
    elif spec.name.startswith("mask_"):
        values = _first_tokens(shape)
    elif spec.name.startswith("text_bias_"):
        values = (1 - _first_tokens(shape)) * MASKED
    elif spec.name in ("modulation", "final_modulation"):
        values = values * TABLE_SCALE
    if spec.dtype == COMPUTE or spec.name.startswith("hidden_"):
        values = values.astype(np.float16)
    return values.astype("float32" if spec.dtype == COMPUTE else spec.dtype)


def _first_tokens(shape: tuple[int, ...]) -> Array:
    """1 for the first two thirds of the last axis, 0 for padding."""
    length = shape[-1]
    row = (np.arange(length) < max(1, 2 * length // 3)).astype(np.float32)
    return np.broadcast_to(row, shape).copy()


def probe_sizes(component: Component, config: GenTronConfig) -> list[dict[str, int]]:
    """The sizes that ship: one guided sample of the native shape, several requests at once in a
    small and odd one, and every count at 1. Sizes that a component cannot tell apart ship once."""
    usual = {"B": 1, "R": 2, "F": config.sample_frames, "T": 2, "U": 1, "K": 1}
    usual |= _native_side(config, usual["R"] * usual["F"])
    mixed = {"B": 2, "R": 5, "F": min(3, config.max_frames), "T": 4, "U": 2, "K": 2}
    mixed |= {"h": config.patch * 3, "w": config.patch * 2}
    least = {"B": 1, "R": 1, "F": 1, "T": 1, "U": 1, "K": 1}
    least |= {"h": config.patch * 2, "w": config.patch * 3}
    axes = sorted({a for spec in component.inputs for a in spec.axes if isinstance(a, str)})
    found: list[dict[str, int]] = []
    for sizes in (usual, mixed, least):
        case = {axis: sizes[axis] for axis in axes}
        if case not in found:
            found.append(case)
    return found


def _native_side(config: GenTronConfig, pictures: int) -> dict[str, int]:
    """The native latent size, halved until torch's reference takes minutes and not hours."""
    height, width = config.sample_height, config.sample_width
    while (
        pictures * height * width // config.patch**2 > MOST_TOKENS
        and height % (2 * config.patch) == width % (2 * config.patch) == 0
    ):
        height, width = height // 2, width // 2
    return {"h": height, "w": width}


def save_probes(file: Path, cases: list[ProbeCase], outputs: list[dict[str, Array]]) -> None:
    from safetensors.numpy import save

    tensors = {
        f"{number}.{name}": values
        for number, case_outputs in enumerate(outputs)
        for name, values in case_outputs.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    # `save_file` would make the file readable by its owner only.
    file.write_bytes(save(tensors, {CASES: json.dumps([vars(case) for case in cases])}))


def load_probes(file: Path) -> list[tuple[ProbeCase, dict[str, Array]]]:
    """Cases with torch's float32 outputs; raises BundleError for a file of another kind."""
    from safetensors import SafetensorError

    try:
        return _load_probes(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file}: not a readable probe file: {error}") from error


def _load_probes(file: Path) -> list[tuple[ProbeCase, dict[str, Array]]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        metadata = stored.metadata() or {}
        if CASES not in metadata:
            raise BundleError(f"{file}: not a probe file; export the bundle again")
        found = []
        for number, values in enumerate(json.loads(metadata[CASES])):
            case = ProbeCase(
                values["seed"],
                values["sizes"],
                tuple(map(tuple, values["token_ids"])),
                tuple(map(tuple, values["token_mask"])),
            )
            prefix = f"{number}."
            found.append(
                (case, {k.removeprefix(prefix): stored.get_tensor(k)
                        for k in stored.keys() if k.startswith(prefix)})  # noqa: SIM118
            )  # fmt: skip
    return found
