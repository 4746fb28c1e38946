"""Shape profiles: which sizes an engine is compiled for, from the contract and a small declaration.

A declaration speaks of what people know (samples, rows, sizes in pixels, frames); a profile gives
every symbolic axis of a component a range. An axis whose range is one number is a fixed size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from gentron.config import GenTronConfig
from gentron.contract import MAX_BRANCHES, Component
from gentron.errors import RequestError
from gentron.latents import latent_size

FIELD = "profile"  # the option at fault, in errors
MOST = 65_536  # of anything but pixels and frames: typing errors, not limits of the hardware
SYNTAX = "samples=1:1:4,rows=1:2:12,size=512x512,frames=8,table=1:80:512,texts=1:2:8,decode=1"


@dataclass(frozen=True)
class AxisRange:
    """Sizes from `least` to `most`; kernels are chosen for `usual`."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise RequestError(
                FIELD, f"a range is LEAST:USUAL:MOST with 1 <= LEAST <= USUAL <= MOST, got {self}"
            )

    @classmethod
    def fixed(cls, size: int) -> AxisRange:
        return cls(size, size, size)

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most

    def __str__(self) -> str:
        return str(self.usual) if self.is_fixed else f"{self.least}:{self.usual}:{self.most}"


Shape = tuple[int, ...]
Profile = Mapping[str, AxisRange]  # of a component's symbolic input axes, by contract letter


@dataclass(frozen=True)
class Declaration:
    """What an engine is to serve; one optimisation profile. Sizes are in pixels."""

    samples: AxisRange
    rows: AxisRange  # branch rows of all samples together
    width: AxisRange
    height: AxisRange
    frames: AxisRange
    table: AxisRange  # modulation rows: one a distinct (text, step)
    texts: AxisRange
    decode: AxisRange  # frames decoded together

    def profile(self, component: Component, vae_factor: int) -> Profile:
        """The ranges of the component's own axes, in the contract's order.

        A component without an axis does not change with it: other row counts leave the decoder's
        engine, and its key, as they are.
        """
        h, w = (_latent(side, vae_factor) for side in (self.height, self.width))
        axes = {"B": self.samples, "R": self.rows, "F": self.frames, "T": self.table}
        axes |= {"U": self.texts, "K": self.decode, "h": h, "w": w}
        used = [a for spec in component.inputs for a in spec.axes if isinstance(a, str)]
        return {axis: axes[axis] for axis in dict.fromkeys(used)}

    def __str__(self) -> str:
        """As `parse_declaration` reads it."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        w, h = parts.pop("width"), parts.pop("height")
        size = f"{w.usual}x{h.usual}"
        if not (w.is_fixed and h.is_fixed):
            size = f"{w.least}x{h.least}:{size}:{w.most}x{h.most}"
        return ",".join(f"{name}={value}" for name, value in {**parts, "size": size}.items())


def default_declaration(config: GenTronConfig, vae_factor: int, *, steps: int = 20) -> Declaration:
    """One size, the native one; up to four samples with any guidance; tables for their steps."""
    samples = AxisRange(1, 1, 4)
    # Guided by text: two rows a sample. A video's motion-free branch is the third.
    rows = AxisRange(1, MAX_BRANCHES if config.temporal else 2, MAX_BRANCHES * samples.most)
    return Declaration(
        samples=samples,
        rows=rows,
        width=AxisRange.fixed(config.sample_width * vae_factor),
        height=AxisRange.fixed(config.sample_height * vae_factor),
        frames=AxisRange(1, config.sample_frames, config.sample_frames),
        table=AxisRange(1, 2 * steps, 512),
        texts=AxisRange(1, 2, 2 * samples.most),
        decode=AxisRange.fixed(1),
    )


def parse_declaration(text: str, default: Declaration, config: GenTronConfig,
                      vae_factor: int) -> Declaration:  # fmt: skip
    """`samples=1:1:4,size=512x512,...`: what is not named stays as in `default`.

    A value is one number, or LEAST:USUAL:MOST; a size WIDTHxHEIGHT. Raises RequestError.
    """
    changes: dict[str, AxisRange] = {}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    names = [part.partition("=")[0] for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestError(FIELD, f"{twice[0]} is given twice; give it once, as LEAST:USUAL:MOST")
    for part in parts:
        name, _, value = part.partition("=")
        if name == "size":
            sides = [_size(v) for v in value.split(":")]
            changes["width"] = _range(part, [w for w, _ in sides])
            changes["height"] = _range(part, [h for _, h in sides])
        elif name in {f.name for f in fields(Declaration)} - {"width", "height"}:
            changes[name] = _range(part, [_number(part, v) for v in value.split(":")])
        else:
            raise RequestError(FIELD, f"unknown name {name!r}; write for example {SYNTAX}")
    declared = replace(default, **changes)
    if "samples" in changes and "rows" not in changes:
        most = declared.samples.most
        per_sample = max(1, default.rows.usual // default.samples.usual)
        usual = min(declared.samples.usual * per_sample, MAX_BRANCHES * most)
        declared = replace(declared, rows=AxisRange(1, usual, MAX_BRANCHES * most))
    check_declaration(declared, config, vae_factor)
    return declared


def check_declaration(declared: Declaration, config: GenTronConfig, vae_factor: int) -> None:
    """Raises RequestError for what the model cannot compute or no request can ever use."""
    for end in ("least", "usual", "most"):
        try:
            latent_size(
                config, vae_factor, getattr(declared.width, end), getattr(declared.height, end)
            )
        except RequestError as error:
            raise RequestError(FIELD, str(error)) from error
    if declared.frames.most > config.max_frames:
        raise RequestError(
            FIELD, f"frames: this model has at most {config.max_frames}, got {declared.frames.most}"
        )
    for name in ("samples", "rows", "table", "texts", "decode"):
        most = getattr(declared, name).most
        if most > MOST:
            raise RequestError(FIELD, f"{name} must be at most {MOST}, got {most}")
    rows, samples = declared.rows, declared.samples
    if rows.most < samples.most or rows.usual < samples.usual:
        raise RequestError(FIELD, f"rows: every sample needs one, got {rows} for {samples} samples")
    if rows.least > MAX_BRANCHES * samples.most:
        raise RequestError(
            FIELD,
            f"rows: a sample has at most {MAX_BRANCHES}, so {samples.most} samples never have "
            f"{rows.least}",
        )


def tensor_shapes(component: Component, profile: Profile) -> dict[str, tuple[Shape, Shape, Shape]]:
    """(least, usual, most) of every input tensor."""

    def shape(axes: tuple[int | str, ...], bound: str) -> Shape:
        return tuple(getattr(profile[a], bound) if isinstance(a, str) else a for a in axes)

    return {
        spec.name: (
            shape(spec.axes, "least"),
            shape(spec.axes, "usual"),
            shape(spec.axes, "most"),
        )
        for spec in component.inputs
    }


def contains(profile: Profile, sizes: Mapping[str, int]) -> bool:
    """Whether axis sizes lie within the profile."""
    return all(sizes[axis] in allowed for axis, allowed in profile.items())


def _latent(pixels: AxisRange, vae_factor: int) -> AxisRange:
    return AxisRange(*(side // vae_factor for side in (pixels.least, pixels.usual, pixels.most)))


def _range(part: str, numbers: list[int]) -> AxisRange:
    if len(numbers) == 1:
        return AxisRange.fixed(numbers[0])
    if len(numbers) != 3:
        raise RequestError(FIELD, f"{part!r}: give one number, or LEAST:USUAL:MOST")
    return AxisRange(*numbers)


def _number(part: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise RequestError(FIELD, f"{part!r}: {text!r} is not a whole number; write {SYNTAX}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not found:
        raise RequestError(FIELD, f"size: {text!r} is not WIDTHxHEIGHT in pixels")
    return int(found[1]), int(found[2])
