"""Writes a tiny PixArt pipeline as diffusers lays one out, with seeded random weights.

    python scripts/pixart_example.py DIR --kind alpha-1024
    gentron-export --checkpoint DIR --fp16 -o bundle

It has every part and every tensor name of the released models and draws noise: for trying the
importer, and for its tests.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

# What tells the released models apart; the pipelines feed sizes where sample_size is 128.
KINDS: dict[str, dict[str, Any]] = {
    "alpha-512": {"sample_size": 64, "use_additional_conditions": False},
    "alpha-1024": {"sample_size": 128, "use_additional_conditions": True},
    "sigma": {
        "sample_size": 128,
        "use_additional_conditions": False,
        "interpolation_scale": 2,
    },
}
TEXT_WIDTH = 32
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "caption_channels": TEXT_WIDTH,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
WORDS = ("a", "the", "cat", "dog", "reading", "newspaper", "panda", "turtle", "on", "of", "red")
CARD = """---
license: openrail++
---
A tiny PixArt with random weights. It draws noise.
"""


def pieces() -> list[tuple[str, float]]:
    """T5's three control pieces, then words, letters and signs with log probabilities."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-()<>/_"
    found = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -3.0)]
    found += [(space + word, -4.0 - 0.1 * i) for i, word in enumerate(WORDS)]
    return found + [(letter, -8.0 - 0.01 * i) for i, letter in enumerate(letters)]


def spiece_model() -> bytes:
    """The pieces as sentencepiece's ModelProto, without a character map."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return _varint(number << 3) + _varint(value)
        return _varint(number << 3 | 2) + _varint(len(value)) + value

    data = b""
    for index, (text, score) in enumerate(pieces()):
        kind = {0: 3, 1: 3, 2: 2}.get(index, 1)  # control, control, unknown, else normal
        scored = _varint(2 << 3 | 5) + struct.pack("<f", score)
        data += field(1, field(1, text.encode()) + scored + field(3, kind))
    return data + field(2, field(3, 1) + field(40, 2)) + field(3, field(1, b"identity"))


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def tokenizer() -> T5Tokenizer:
    """transformers' own T5 tokenizer over the same pieces."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    return T5Tokenizer(
        vocab=[*pieces(), *((name, 0.0) for name in sentinels)],
        additional_special_tokens=sentinels,
    )


def make_transformer(kind: str, **changes: Any) -> PixArtTransformer2DModel:
    """Seeded; diffusers' own initialisation leaves no gate closed."""
    torch.manual_seed(12)
    return PixArtTransformer2DModel(**{**TRANSFORMER, **KINDS[kind], **changes}).eval()


def write_pixart(
    folder: Path, kind: str, *, shard_size: str = "5GB", **changes: Any
) -> PixArtAlphaPipeline:
    """Writes the pipeline of one of KINDS to `folder` and returns diffusers' own, in float32.

    `changes` are of the transformer's configuration. The tokenizer folder only has `spiece.model`,
    as in the released models.
    """
    transformer = make_transformer(kind, **changes)
    torch.manual_seed(13)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces()) + 100 + 12,  # padded, as T5's is
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    autoencoder = AutoencoderKL(**VAE).eval()
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight *= 6  # some contrast
        for module in (transformer, encoder, autoencoder):
            for parameter in module.parameters():
                parameter.copy_(parameter.half())  # so that storing float16 loses nothing
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
    pipeline = PixArtSigmaPipeline if kind == "sigma" else PixArtAlphaPipeline
    pipe = pipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipe.save_pretrained(folder)
    if shard_size != "5GB":
        for part, module in (("transformer", transformer), ("text_encoder", encoder)):
            for file in (folder / part).glob("*.safetensors"):
                file.unlink()
            module.save_pretrained(folder / part, max_shard_size=shard_size)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece_model())
    (folder / "README.md").write_text(CARD, "utf-8")
    (folder / "checkpoint.json").write_text(json.dumps({"weights": "random"}) + "\n", "utf-8")
    return pipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="alpha-1024")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists; remove it, or choose another folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_pixart(given.folder, given.kind)
    print(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
