"""Writes the trained parts as a checkpoint in diffusers' layout, ready for gentron-export."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from gentron.config import GenTronConfig, SamplingDefaults
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.card import write_card
from gentron.train.pools import LatentPool
from gentron.train.text import FrozenText, minilm_folder

LICENCES = (
    {
        "what": "transformer, vae",
        "licence": "Apache-2.0",
        "from": "trained by this project on pictures drawn with the font below",
    },
    {
        "what": "text_encoder, tokenizer",
        "licence": "Apache-2.0",
        "from": "sentence-transformers/all-MiniLM-L6-v2",
    },
    {
        "what": "training pictures",
        "licence": "OFL-1.1",
        "from": "Noto Color Emoji, Copyright 2013-2017 Google Inc.",
    },
)


def write_checkpoint(
    folder: Path,
    model: GenTron,
    autoencoder: nn.Module,
    pool: LatentPool,
    text: FrozenText,
    *,
    provenance: dict[str, object],
    defaults: SamplingDefaults = EMOJI.defaults,
    config: GenTronConfig = EMOJI.transformer,
    name: str = EMOJI.name,
) -> None:
    """Replaces `folder` in one move, so that an export never sees half a checkpoint."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    index = {
        "_class_name": "GenTronPipeline",
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["gentron", "GenTron"],
        "vae": ["diffusers", "AutoencoderDC"],
        "scheduler": ["diffusers", EMOJI.scheduler["_class_name"]],
    }
    vae_config = {
        key: value for key, value in dict(autoencoder.config).items() if not key.startswith("_")
    } | {
        "_class_name": "AutoencoderDC",
        "scaling_factor": 1.0,
        "latents_mean": pool.mean.tolist(),
        "latents_std": pool.std.tolist(),
    }
    _json(partial / "model_index.json", index)
    _json(
        partial / "checkpoint.json",
        {
            "name": name,
            "weights": "trained",
            "defaults": vars(defaults),
            "provenance": provenance,
            "licences": LICENCES,
        },
    )
    _json(partial / "transformer" / "config.json", config.to_dict())
    _json(partial / "vae" / "config.json", vae_config)
    _json(partial / "scheduler" / "scheduler_config.json", EMOJI.scheduler)
    _json(partial / "text_encoder" / "config.json", _encoder_config())
    _save(partial / "transformer" / "diffusion_pytorch_model.safetensors", model)
    _save(partial / "vae" / "diffusion_pytorch_model.safetensors", autoencoder)
    _save(partial / "text_encoder" / "model.safetensors", text.model)
    (partial / "tokenizer").mkdir()
    shutil.copyfile(minilm_folder() / "tokenizer.json", partial / "tokenizer" / "tokenizer.json")
    package = files("gentron.train")
    shutil.copytree(str(package / "model_card" / "LICENSES"), partial / "LICENSES")
    (partial / "nouns.txt").write_text(package.joinpath("nouns.txt").read_text("utf-8"), "utf-8")
    write_card(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _encoder_config() -> dict[str, object]:
    values = json.loads((minilm_folder() / "config.json").read_text("utf-8"))
    kept = ("attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size",
            "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
            "model_type", "num_attention_heads", "num_hidden_layers", "pad_token_id",
            "type_vocab_size", "vocab_size")  # fmt: skip
    return {key: values[key] for key in kept}


def _save(file: Path, module: nn.Module) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(torch.float32).contiguous()
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def _json(file: Path, values: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
