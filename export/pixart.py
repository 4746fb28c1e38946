"""A diffusers PixArt pipeline, read as a GenTron with one T5 encoder.

PixArt's network (Chen et al., arXiv 2310.00426, and Sigma, 2403.04692) differs from GenTron only in
what runs once: its modulation is one projection with tables, its text passes an MLP first, and it
has no pooled text. So it deploys through the same graphs; the diffusers classes
PixArtTransformer2DModel, PixArtAlphaPipeline and PixArtSigmaPipeline say what exact means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from gentron.config import GenTronConfig, SamplingDefaults
from gentron.contract import text_encoder_name
from gentron.errors import BundleError
from gentron.export.components import TRANSFORMER, VAE, Source
from gentron.export.lora import merge, parse_lora, read_lora
from gentron.export.pipeline_folder import (
    Licence,
    find_licence,
    modern_names,
    pipeline_tensors,
    read_json,
)
from gentron.export.pixart_config import pixart_config
from gentron.export.pixart_tensors import (
    SIZE_LAYERS,
    UNUSED,
    check_names,
    pixart_rules,
    source_shapes,
)
from gentron.export.source import ABOUT, EXTRAS, Origin, check_tensors, expected_tensors
from gentron.export.spiece import EXTRA_IDS, spiece_tokenizer
from gentron.export.streamed import read_tensor
from gentron.latents import vae_factor
from gentron.schedule import NoiseSchedule
from gentron.solvers import solvers_for
from gentron.weights import StoredTensor

# Token limits of the pipelines' own `max_sequence_length`.
PIPELINES = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
STEPS, GUIDANCE = 20, 4.5  # defaults of both pipelines
STUDENT_STEPS, STUDENT_GUIDANCE = 4, 1.0  # of PixArt-LCM, which has its guidance distilled
TEXT = text_encoder_name(0)
TIED = "encoder.embed_tokens.weight"  # T5's second name for `shared.weight`
# Solver that a pipeline with this scheduler class runs.
SOLVERS = {
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}


def from_pixart(folder: Path, loras: Sequence[str] = ()) -> Origin:
    """A folder that diffusers' PixArtAlphaPipeline or PixArtSigmaPipeline opens; everything else
    is refused with a BundleError that names the file and says what to do. `loras` (FILE or
    FILE:SCALE) are merged into the transformer in their order."""
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    stored = {
        TRANSFORMER: pipeline_tensors(folder / TRANSFORMER, "diffusion_pytorch_model"),
        TEXT: pipeline_tensors(folder / TEXT, "model"),
        VAE: modern_names(pipeline_tensors(folder / VAE, "diffusion_pytorch_model")),
    }
    source, head_channels = _source(folder, pipeline, stored[TRANSFORMER])
    config = source.config
    shapes = {name: tensor.shape for name, tensor in stored[TRANSFORMER].items()}
    expected = source_shapes(config, head_channels)
    check_names(str(folder / TRANSFORMER), shapes, expected)
    adapters = tuple(read_lora(*parse_lora(text), expected) for text in loras)
    if TIED in (encoder := stored[TEXT]):
        encoder.setdefault("shared.weight", encoder.pop(TIED))
    for part in (TEXT, VAE):
        check_tensors(folder / part, dict(expected_tensors(source, part)), stored[part])
    rules = pixart_rules(config, head_channels)

    def read(part: str, name: str, _: tuple[int, ...]) -> Tensor:
        if part != TRANSFORMER:
            return read_tensor(stored[part][name])
        rule = rules[name]
        return rule.make(
            [merge(adapters, source, read_tensor(stored[part][source])) for source in rule.sources]
        )

    about = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    licence = find_licence(folder)
    solver = SOLVERS[source.scheduler["_class_name"]]
    provenance: dict[str, Any] = {
        "imported from": f"{_kind(pipeline, config)}, a diffusers {pipeline}"
    }
    if adapters:
        provenance["loras"] = [adapter.provenance for adapter in adapters]
    merged = [f"merging {a.file.name} at {a.scale:g} into {len(a.pairs)} layers" for a in adapters]
    return Origin(
        name=folder.resolve().name,
        source=source,
        weights=about.get("weights", "trained"),
        fingerprint=_fingerprint(folder, stored) | {"loras": provenance.get("loras", [])},
        defaults=SamplingDefaults(
            solver, *((STUDENT_STEPS, STUDENT_GUIDANCE) if solver == "lcm" else (STEPS, GUIDANCE))
        ),
        tokenizers=(_tokenizer(folder / "tokenizer", source.encoders[0]),),
        read=read,
        provenance=provenance,
        licences=_licences(licence),
        extras={name: folder / name for name in EXTRAS if (folder / name).exists()} | licence.files,
        notes=(*_notes(pipeline, config, head_channels, shapes, licence), *merged),
    )


def _kind(pipeline: str, config: GenTronConfig) -> str:
    name = "PixArt-alpha" if pipeline == "PixArtAlphaPipeline" else "PixArt-Sigma"
    return f"{name}{' with size conditioning' if config.size_conditioning else ''}"


def _source(folder: Path, pipeline: str, tensors: Mapping[str, StoredTensor]) -> tuple[Source, int]:
    """The configurations, and how many channels the transformer's head has."""
    encoder = read_json(folder / TEXT / "config.json")
    if encoder.get("model_type") != "t5":
        raise BundleError(
            f"{folder / TEXT / 'config.json'}: model_type {encoder.get('model_type')!r} is not "
            "supported; PixArt's encoder is t5"
        )
    vae = read_json(folder / VAE / "config.json")
    if vae.get("_class_name") != "AutoencoderKL":
        raise BundleError(
            f"{folder / VAE / 'config.json'}: {vae.get('_class_name')!r} is not supported; "
            "PixArt's is AutoencoderKL"
        )
    values = read_json(folder / TRANSFORMER / "config.json")
    where = str(folder / TRANSFORMER / "config.json")
    config = pixart_config(
        values,
        where,
        text_width=encoder.get("d_model", 0),
        max_tokens=PIPELINES[pipeline],
        size_conditioning=any(name.startswith(SIZE_LAYERS) for name in tensors),
        factor=vae_factor(vae),
    )
    if vae.get("latent_channels", 4) != config.latent_channels:
        raise BundleError(
            f"{where}: in_channels {config.latent_channels}, the autoencoder has "
            f"{vae.get('latent_channels', 4)}; give the pipeline the vae it was trained with"
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    schedule = NoiseSchedule.from_config(scheduler)
    solver = SOLVERS[scheduler["_class_name"]]
    if solver not in solvers_for(schedule):
        raise BundleError(
            f"{folder / 'scheduler' / 'scheduler_config.json'}: {scheduler['_class_name']} with "
            "clip_sample is not supported; set clip_sample to false"
        )
    head = int(values.get("out_channels") or config.latent_channels)
    return Source(config, (encoder,), vae, scheduler), head


def _tokenizer(folder: Path, encoder: Mapping[str, Any]) -> str:
    """Raises BundleError where a token has no row in the encoder's table."""
    text = _tokenizer_text(folder)
    try:
        size = Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the package raises bare Exception
        raise BundleError(
            f"{folder / 'tokenizer.json'}: not a readable tokenizer: {error}; copy it again"
        ) from error
    if size > (rows := encoder.get("vocab_size", 0)):
        raise BundleError(
            f"{folder}: {size} tokens, the text encoder knows {rows}; give the pipeline the "
            "tokenizer that belongs to its text_encoder"
        )
    return text


def _tokenizer_text(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return json.dumps(read_json(folder / "tokenizer.json"))
    if not (folder / "spiece.model").is_file():
        raise BundleError(
            f"{folder}: neither tokenizer.json nor spiece.model; copy the tokenizer of the "
            "pipeline's base model"
        )
    settings = folder / "tokenizer_config.json"
    extra = read_json(settings).get("extra_ids", EXTRA_IDS) if settings.is_file() else EXTRA_IDS
    if type(extra) is not int or extra < 0:
        raise BundleError(f"{settings}: extra_ids is {extra!r}; copy it again")
    return spiece_tokenizer(folder / "spiece.model", extra)


def _fingerprint(folder: Path, stored: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, Any]:
    files = {tensor.file for tensors in stored.values() for tensor in tensors.values()}
    return {
        "checkpoint": str(folder.resolve()),
        "files": sorted(
            (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files
        ),
    }


def _licences(licence: Licence) -> tuple[dict[str, str], ...]:
    if not licence.files:
        return ()
    name = licence.name or "not named; read the file"
    return (
        {"what": "transformer, text_encoder, vae", "licence": name, "from": min(licence.files)},
    )


def _notes(
    pipeline: str,
    config: GenTronConfig,
    head_channels: int,
    names: Mapping[str, object],
    licence: Licence,
) -> list[str]:
    """What was found, kept and dropped, and on what terms; a line each."""
    side = config.sample_height
    lines = [
        f"found {_kind(pipeline, config)}: {len(names)} tensors, {config.depth} blocks, "
        f"{config.width} wide, trained at {side}x{side} latents, T5 with "
        f"{config.text[0].max_tokens} tokens"
    ]
    dropped = [name for name in UNUSED if name in names]
    if head_channels != config.latent_channels:
        dropped.append(
            f"the variance half of proj_out (kept: {config.latent_channels} of {head_channels} "
            "channels, the predicted noise)"
        )
    lines.append(f"dropped: {', '.join(dropped)}" if dropped else "nothing is dropped")
    if licence.restricts:
        lines.append(
            f"licence {licence.name}: its use restrictions apply to this bundle and to what it "
            "draws; the text is in LICENSES"
        )
    elif licence.files:
        lines.append(
            f"licence {licence.name or 'without a name'}: its terms apply to this bundle; the text "
            "is in LICENSES"
        )
    else:
        lines.append("no licence file and no model card: find out on what terms you may use them")
    return lines
