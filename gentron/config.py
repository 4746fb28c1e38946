"""What a GenTron is: every choice of the paper, and every choice that the paper leaves open.

A field the paper does not fix carries its reason beside the default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gentron.errors import BundleError

TextFamily = Literal["clip", "t5", "bert"]
Injection = Literal["cross_attention", "adaln"]
AdaLN = Literal["per_block", "shared"]


def _check_counts(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < 1:
            raise BundleError(f"config: {name} must be at least 1, got {value!r}")


@dataclass(frozen=True)
class TextConfig:
    """One text encoder as the transformer sees it."""

    family: TextFamily
    width: int  # of the token embeddings, the input of the key and value projections
    max_tokens: int  # prompts are padded and cut to this; fixed, so the text tables are static
    # CLIP's own pooled state is unmasked padding free; T5 and BERT are averaged over real tokens.
    gives_pooled: bool = False
    # The paper is silent; PixArt masks padding, Stable Diffusion (CLIP) attends to it.
    attend_padding: bool = False
    # A two-layer MLP to the transformer's width before the key and value projections (PixArt).
    # The paper's cross-attention takes the encoder's own width.
    projected: bool = False
    # Prompts are lower-cased and stripped before they become tokens (PixArt's pipelines).
    lower_case: bool = False

    def __post_init__(self) -> None:
        if self.family not in ("clip", "t5", "bert"):
            raise BundleError(f"config: text family {self.family!r} is not one of clip, t5, bert")
        _check_counts(self, "width", "max_tokens")


@dataclass(frozen=True)
class GenTronConfig:
    """The transformer of paper sections 3.1 to 3.3."""

    width: int  # D
    depth: int
    mlp_width: int
    text: tuple[TextConfig, ...]  # two encoders alternate from block to block (appendix A)
    # Table 1 has no heads: DiT-XL and PixArt use 16, as does the ViT-G that G/2's shape is from.
    heads: int = 16
    injection: Injection = "cross_attention"  # figure 2b; "adaln" is figure 2a
    temporal: bool = False  # temporal self-attention in every block (section 3.3.1)
    # Whether a frame's code, relative to that of the frame that asks, enters the values too. The
    # paper is silent on codes. With codes in queries and keys alone, frames of pure noise cannot
    # tell which one they are, and a clip's motion is decided while it is almost pure noise.
    frame_values: bool = False
    latent_channels: int = 4  # section 3.1: 32x32x4 latents for 256x256 pixels
    patch: int = 2  # the "/2" of every preset
    sample_height: int = 64  # h of the training latents: 512 pixels at f = 8 (section 4.1)
    sample_width: int = 64
    sample_frames: int = 1  # 8 for video (section 4.1)
    max_frames: int = 1
    # Absent in DiT, PixArt-alpha and Latte. LayerNorm per head: one ONNX node, no RMS chain.
    qk_norm: bool = False
    # DiT's cross-attention variant normalises the query stream, PixArt does not; paper silent.
    cross_attention_norm: bool = True
    # "per_block": each block has its own projection of the condition (section 3.2). "shared": one
    # for all blocks, plus a table for each; the final norm has a table alone (PixArt's
    # adaLN-single, arXiv 2310.00426, section 2.3).
    adaln: AdaLN = "per_block"
    # The picture's height, width and their ratio are added to the time code (PixArt-alpha 1024).
    size_conditioning: bool = False
    time_features: int = 256  # DiT
    # Position codes span base_grid / interpolation units whatever the size (PixArt's rule).
    position_base: int = 32
    position_interpolation: float = 1.0
    # Sides in pixels that the graphs accept, as (smallest, largest); a side is also a multiple of
    # patch x the autoencoder's factor.
    side_range: tuple[int, int] = (64, 2048)

    def __post_init__(self) -> None:
        _check_counts(self, "width", "depth", "mlp_width", "heads", "latent_channels", "patch")
        _check_counts(self, "sample_height", "sample_width", "sample_frames", "max_frames")
        _check_counts(self, "time_features", "position_base")
        if self.injection not in ("cross_attention", "adaln"):
            raise BundleError(
                f"config: injection {self.injection!r} is not one of cross_attention, adaln"
            )
        if self.adaln not in ("per_block", "shared"):
            raise BundleError(f"config: adaln {self.adaln!r} is not one of per_block, shared")
        if self.size_conditioning and self.width % 3:
            raise BundleError(
                f"config: width {self.width} must be a multiple of 3 for size_conditioning"
            )
        sides = self.side_range
        if (
            len(sides) != 2
            or any(type(s) is not int for s in sides)
            or not 0 < sides[0] <= sides[1]
        ):
            raise BundleError(f"config: side_range must be (smallest, largest), got {sides}")
        if self.width % (4 * self.heads):
            raise BundleError(
                f"config: width {self.width} must be a multiple of 4 x heads ({self.heads})"
            )
        if not 1 <= len(self.text) <= 2:
            raise BundleError(f"config: one or two text encoders, got {len(self.text)}")
        if self.injection == "cross_attention" and self.depth < len(self.text):
            raise BundleError(f"config: depth {self.depth} leaves a text encoder without a block")
        if self.injection == "adaln" and not self.pooled_width:
            raise BundleError("config: injection 'adaln' needs an encoder that gives pooled text")
        if sum(t.gives_pooled for t in self.text) > 1:
            raise BundleError("config: at most one text encoder may give the pooled embedding")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding that is added to the time code; 0 for none."""
        return sum(t.width for t in self.text if t.gives_pooled)

    def text_blocks(self, encoder: int) -> range:
        """Indices of the blocks whose cross-attention reads this encoder (appendix A)."""
        if self.injection == "adaln":
            return range(0)
        return range(encoder, self.depth, len(self.text))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenTronConfig:
        """Raises BundleError that names an unknown or missing field."""
        given = dict(values)
        text = given.pop("text", ())
        try:
            if "side_range" in given:
                given["side_range"] = tuple(given["side_range"])
            return cls(text=tuple(TextConfig(**item) for item in text), **given)
        except TypeError as error:
            raise BundleError(
                f"transformer config: {error}; was it written by a newer version?"
            ) from error


@dataclass(frozen=True)
class SamplingDefaults:
    """What `gentron-run` uses unless told otherwise; part of the bundle."""

    solver: str
    steps: int
    guidance: float
    motion: float = 1.0  # lambda_M of equation 6

    def __post_init__(self) -> None:
        _check_counts(self, "steps")
        for name in ("guidance", "motion"):
            if type(getattr(self, name)) not in (int, float):
                raise BundleError(f"defaults: {name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.solver, str):
            raise BundleError(f"defaults: solver must be a name, got {self.solver!r}")


@dataclass(frozen=True)
class ModelSpec:
    """A whole system by name: transformer, autoencoder, noise schedule, defaults."""

    name: str
    transformer: GenTronConfig
    encoders: tuple[dict[str, Any], ...]  # transformers configurations, `model_type` included
    vae: dict[str, Any]  # a diffusers configuration, `_class_name` included
    scheduler: dict[str, Any]  # a diffusers configuration, `_class_name` included
    defaults: SamplingDefaults
    note: str = ""
