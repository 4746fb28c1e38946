"""The shapes that a TensorRT engine was compiled for, read from the engine; choosing among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gentron.contract import AXES, Component
from gentron.engines.shapes import AxisRange, Profile, contains
from gentron.errors import RequestError

# What --profile calls an axis.
WORDS = {"B": "samples", "R": "rows", "F": "frames", "T": "table", "U": "texts", "K": "decode"}


def read_profiles(engine: Any, component: Component) -> tuple[Profile, ...]:
    """From the engine itself, which may be of another time or place than the request for it."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        ranges: dict[str, AxisRange] = {}
        for spec in component.inputs:
            bounds = engine.get_tensor_profile_shape(spec.name, index)
            for position, axis in enumerate(spec.axes):
                if isinstance(axis, str):
                    ranges[axis] = AxisRange(*(int(shape[position]) for shape in bounds))
        profiles.append(ranges)
    return tuple(profiles)


def choose(component: Component, profiles: Sequence[Profile], sizes: Mapping[str, int],
           side_factor: int) -> int:  # fmt: skip
    """The profile whose kernels were chosen for these sizes, else the first that allows them.

    Raises RequestError that names the axis, what is allowed, and what to build.
    """
    fitting = [index for index, profile in enumerate(profiles) if contains(profile, sizes)]
    if not fitting:
        raise _outside(component, profiles, sizes, side_factor)
    return min(
        fitting,
        key=lambda index: sum(
            allowed.usual != sizes[axis] for axis, allowed in profiles[index].items()
        ),
    )


def _outside(component: Component, profiles: Sequence[Profile], sizes: Mapping[str, int],
             side_factor: int) -> RequestError:  # fmt: skip
    """Of the profile that is nearest."""

    def wrong(profile: Profile) -> list[str]:
        return [axis for axis, allowed in profile.items() if sizes[axis] not in allowed]

    nearest = min(profiles, key=lambda profile: len(wrong(profile)))
    axes = wrong(nearest)
    said = []
    for axis in axes:
        unit = side_factor if axis in "hw" else 1
        size, least, most = (
            n * unit for n in (sizes[axis], nearest[axis].least, nearest[axis].most)
        )
        side = {"h": "height", "w": "width"}.get(axis)
        # Of "branch rows, 1 to 3 a sample" the first words.
        what = f"a {side} of {size} pixels" if side else f"{size} {re.split('[,:]', AXES[axis])[0]}"
        said.append(f"{what} ({axis} is {least if least == most else f'{least} to {most}'})")
    wanted = ",".join(_declaration(axes, nearest, sizes, side_factor))
    return RequestError(
        "profile",
        f"the engine of {component.name} was not compiled for {', '.join(said)}; ask for what it "
        f"allows, or build one with --profile {wanted}",
    )


def _declaration(
    axes: Sequence[str], profile: Profile, sizes: Mapping[str, int], side_factor: int
) -> list[str]:
    """As --profile takes it: the ranges, as wide as they must become."""
    parts = []
    if set(axes) & set("hw"):
        parts.append(f"size={sizes['w'] * side_factor}x{sizes['h'] * side_factor}")
    for axis in axes:
        if axis in WORDS:
            now, size = profile[axis], sizes[axis]
            parts.append(f"{WORDS[axis]}={min(now.least, size)}:{now.usual}:{max(now.most, size)}")
    return parts
