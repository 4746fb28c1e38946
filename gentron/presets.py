"""The models by name: the paper's tables 1 and 2, the shipped `emoji`, and `tiny` for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gentron.config import GenTronConfig, ModelSpec, SamplingDefaults, TextConfig
from gentron.errors import RequestError

CLIP_TEXT = TextConfig("clip", width=768, max_tokens=77, gives_pooled=True, attend_padding=True)
T5_TEXT = TextConfig("t5", width=4096, max_tokens=120)  # PixArt-alpha's length; paper silent

CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
T5_XXL: dict[str, Any] = {  # Flan-T5-XXL, encoder half
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}
SD_VAE: dict[str, Any] = {  # fits section 3.1's shapes; the paper names neither it nor its factor
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
LINEAR_EPSILON: dict[str, Any] = {  # equation 1's process with DiT's schedule; paper silent on both
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
}
FLOW: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
IMAGE_DEFAULTS = SamplingDefaults("dpm++2m", 20, 4.5)  # PixArt's defaults; paper silent
VIDEO_DEFAULTS = SamplingDefaults("ddim", 50, 7.5, motion=1.2)  # section 3.3.2: 7.5, 1.0 to 1.3

XL2 = ModelSpec(
    name="xl2",
    transformer=GenTronConfig(width=1152, depth=28, mlp_width=4608, text=(CLIP_TEXT, T5_TEXT)),
    encoders=(CLIP_L, T5_XXL),
    vae=SD_VAE,
    scheduler=LINEAR_EPSILON,
    defaults=IMAGE_DEFAULTS,
    note="GenTron-XL/2 (table 1)",
)
G2 = replace(
    XL2,
    name="g2",
    transformer=replace(XL2.transformer, width=1664, depth=48, mlp_width=6656),
    note="GenTron-G/2 (table 1)",
)


def _with_text(base: ModelSpec, name: str, note: str, *encoders: int, **changes: Any) -> ModelSpec:
    text = tuple(base.transformer.text[i] for i in encoders)
    if not any(t.gives_pooled for t in text):  # T5 alone: masked mean, so that table 2 is one model
        text = (replace(text[0], gives_pooled=True), *text[1:])
    return replace(
        base,
        name=name,
        note=note,
        transformer=replace(base.transformer, text=text, **changes),
        encoders=tuple(base.encoders[i] for i in encoders),
    )


def _video(base: ModelSpec, name: str, note: str) -> ModelSpec:
    transformer = replace(base.transformer, temporal=True, sample_frames=8, max_frames=64)
    return replace(
        base, name=name, note=note, transformer=transformer, defaults=VIDEO_DEFAULTS
    )  # fmt: skip


def _table2(base: ModelSpec, prefix: str) -> tuple[ModelSpec, ...]:
    return (
        _with_text(base, f"{prefix}-clip-adaln", "CLIP-L, adaLN-Zero", 0, injection="adaln"),
        _with_text(base, f"{prefix}-clip", "CLIP-L, cross-attention", 0),
        _with_text(base, f"{prefix}-t5", "T5-XXL, cross-attention", 1),
    )


_TINY_CLIP = {
    **CLIP_L,
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 32,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 258,
}
_TINY_T5 = {
    **T5_XXL,
    "vocab_size": 259,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 3,
}
TINY = ModelSpec(
    name="tiny",
    transformer=GenTronConfig(
        width=64,
        depth=3,
        mlp_width=128,
        heads=4,
        text=(
            replace(CLIP_TEXT, width=32, max_tokens=16),
            replace(T5_TEXT, width=48, max_tokens=24),
        ),
        sample_height=8,
        sample_width=8,
        position_base=4,
        side_range=(16, 256),
    ),
    encoders=(_TINY_CLIP, _TINY_T5),
    vae={
        **SD_VAE,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    scheduler=LINEAR_EPSILON,
    defaults=SamplingDefaults("dpm++2m", 4, 4.5),
    note="two interleaved encoders, 64 wide: for tests",
)

EMOJI = ModelSpec(
    name="emoji",
    transformer=GenTronConfig(
        width=256,
        depth=10,
        mlp_width=1024,
        heads=4,
        text=(TextConfig("bert", width=384, max_tokens=32, gives_pooled=True),),
        latent_channels=8,
        sample_height=16,
        sample_width=16,
        qk_norm=True,  # keeps a high learning rate stable
        position_base=8,
        side_range=(64, 256),
    ),
    encoders=(),  # all-MiniLM-L6-v2, frozen; its configuration comes with its weights
    vae={"_class_name": "AutoencoderDC"},  # trained here: gentron.train.autoencoder has its shape
    # More steps where there is most noise, where a caption decides.
    scheduler={**FLOW, "shift": 3.0},
    # More steps draw no better, see the model card.
    defaults=SamplingDefaults("euler-churn", 8, 4.0),
    note="trained on composed pictures of emoji; ships with the package",
)

PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        XL2,
        G2,
        _video(XL2, "xl2-video", "GenTron-XL/2 text-to-video (section 3.3)"),
        _video(G2, "g2-video", "GenTron-G/2 text-to-video (section 3.3)"),
        *_table2(XL2, "xl2"),
        TINY,
        _video(TINY, "tiny-video", "tiny with temporal attention"),
        *_table2(TINY, "tiny"),
        EMOJI,
    )
}


def preset(name: str) -> ModelSpec:
    """Raises RequestError that lists the names."""
    if name not in PRESETS:
        raise RequestError("model", f"unknown preset {name!r}; one of {', '.join(PRESETS)}")
    return PRESETS[name]
