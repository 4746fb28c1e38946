"""What cannot be deployed exactly is refused by name, in one line, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentron.errors import BundleError
from gentron.export.bundle_writer import export_bundle
from gentron.export.pipeline_folder import find_licence
from gentron.export.source import from_checkpoint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pixart, tmp_path) -> Path:
    return Path(shutil.copytree(pixart("alpha-1024").folder, tmp_path / "pixart"))


def refused(folder: Path, message: str) -> str:
    with pytest.raises(BundleError, match=message) as caught:
        from_checkpoint(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values), "utf-8")


EXTRA = [
    (
        "transformer_blocks.1.attn1.sr.weight",
        "KV-compressed self-attention, which is",
    ),
    ("transformer_blocks.0.attn1.norm_q.weight", "QK-norm, which is not supported"),
    ("transformer_blocks.0.attn1.q_norm.weight", "QK-norm, which is not supported"),
    ("blocks.0.attn.qkv.weight", "PixArt's own training code; convert it first"),
    ("transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA, not a transformer"),
    (
        "transformer_blocks.2.scale_shift_table",
        "not part of PixArt: transformer_blocks.2",
    ),
    ("something", "not part of PixArt: something"),
]


@pytest.mark.parametrize(("name", "message"), EXTRA)
def test_tensors_of_other_models_are_refused_by_the_models_name(folder, name, message) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t.update({name: torch.ones(4)}))
    assert name in refused(folder, message)


def test_missing_and_misshapen_tensors_are_named_together(folder) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["caption_projection.linear_1.bias"]
        tensors["proj_out.weight"] = tensors["proj_out.weight"][:16].clone()

    edit_tensors(folder / WEIGHTS, damage)
    line = refused(folder, "2 tensors are not what its config.json asks for")
    assert "missing: caption_projection.linear_1.bias" in line
    assert "shape [16, 48], not [32, 48]: proj_out.weight" in line


def test_size_conditioning_is_decided_by_its_tensors(folder, pixart) -> None:
    config = folder / "transformer" / "config.json"
    edit_json(config, use_additional_conditions=None)
    assert from_checkpoint(folder).source.config.size_conditioning
    edit_json(config, use_additional_conditions=False)
    refused(folder, "use_additional_conditions is False, but the weights have adaln_single.emb")
    edit_json(config, use_additional_conditions=None, sample_size=64)
    edit_tensors(
        folder / WEIGHTS,
        lambda t: [t.pop(n) for n in list(t) if "resolution_emb" in n or "aspect_ratio_emb" in n],
    )
    assert not from_checkpoint(folder).source.config.size_conditioning


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("transformer", {"patch_size": 0}, "sample_size 128 in patches of 0"),
        ("transformer", {"sample_size": 65}, "sample_size 65 in patches of 2"),
        ("transformer", {"interpolation_scale": 0}, "interpolation_scale 0 must be positive"),
        ("transformer", {"num_attention_heads": 0}, "num_attention_heads 0"),
        ("transformer", {"norm_type": "ada_norm_zero"}, "norm_type 'ada_norm_zero' is not support"),
        ("transformer", {"activation_fn": "geglu"}, "activation_fn 'geglu' is not supported"),
        ("transformer", {"attention_bias": False}, "attention_bias False is not supported"),
        ("transformer", {"norm_elementwise_affine": True}, "norm_elementwise_affine True"),
        ("transformer", {"norm_eps": 1e-5}, "norm_eps 1e-05 is not supported"),
        ("transformer", {"qk_norm": True}, "qk_norm True is not supported"),
        ("transformer", {"_class_name": "DiTTransformer2DModel"}, "'DiTTransformer2DModel' is not"),
        ("transformer", {"out_channels": 12}, "out_channels 12 is not supported"),
        ("transformer", {"caption_channels": 64}, "caption_channels 64, the text encoder is 32"),
        ("transformer", {"cross_attention_dim": 64}, "cross_attention_dim 64 is not supported"),
        ("transformer", {"num_layers": None}, "not a PixArt configuration"),
        ("transformer", {"num_layers": 3}, "missing: transformer_blocks.2"),
        ("transformer", {"in_channels": 16, "out_channels": 32}, "in_channels 16, the autoencoder"),
        ("text_encoder", {"model_type": "umt5"}, "model_type 'umt5' is not supported"),
        ("text_encoder", {"num_layers": 1}, "not part of this model: encoder.block.1"),
        ("vae", {"_class_name": "AutoencoderDC"}, "'AutoencoderDC' is not supported"),
    ],
)
def test_a_configuration_that_is_not_pixarts_is_refused_by_its_key(
    folder, part, values, message
) -> None:
    edit_json(folder / part / "config.json", **values)
    assert str(folder / part) in refused(folder, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "TCDScheduler"}, "_class_name 'TCDScheduler' is not supported"),
        ({"_class_name": "EulerDiscreteScheduler"}, "'EulerDiscreteScheduler' is not supported"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver\\+\\+' is not"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True is not supported"),
        ({"thresholding": True}, "thresholding True is not supported"),
        ({"solver_order": 3}, "solver_order 3 is not supported"),
        ({"variance_type": "learned_range"}, "variance_type 'learned_range' is not supported"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "set clip_sample to false"),
    ],
)
def test_a_scheduler_that_cannot_be_honoured_is_refused_by_its_key(folder, values, message) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **values)
    refused(folder, message)


def test_a_consistency_student_takes_four_steps_without_guidance(folder) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "LCMScheduler", "beta_schedule": "linear",
                                "beta_start": 0.0001, "beta_end": 0.02}), "utf-8")  # fmt: skip
    defaults = from_checkpoint(folder).defaults
    assert (defaults.solver, defaults.steps, defaults.guidance) == ("lcm", 4, 1.0)


def test_an_encoder_of_another_width_is_refused(folder) -> None:
    edit_json(folder / "text_encoder" / "config.json", d_model=None)
    refused(folder, "caption_channels 32, the text encoder is None wide")


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_schedulers_spacing_is_kept(folder, spacing) -> None:
    from diffusers import DPMSolverMultistepScheduler

    from gentron.schedule import NoiseSchedule
    from gentron.solvers import solver_table

    edit_json(folder / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    origin = from_checkpoint(folder)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(20)
    table = solver_table(
        origin.defaults.solver, NoiseSchedule.from_config(origin.source.scheduler), 20
    )
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()


def test_pickles_are_never_read(folder) -> None:
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole = (folder / part / f"{name}.safetensors").read_bytes()
        (folder / part / f"{name}.safetensors").unlink()
        (folder / part / f"{name}.bin").write_bytes(b"\x80\x04.")
        refused(folder, "only pickled weights .* never read; load the pipeline with diffusers")
        (folder / part / f"{name}.safetensors").write_bytes(whole)
    assert from_checkpoint(folder).weights  # a pickle beside safetensors is left alone


def test_one_variant_is_read_and_several_are_not_guessed_among(folder) -> None:
    file = folder / WEIGHTS
    half = file.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copyfile(file, half)
    assert from_checkpoint(folder)  # diffusers opens the plain one
    file.unlink()
    origin = from_checkpoint(folder)
    assert origin.read("transformer", "denoiser.patchify.weight", (48, 16)).shape == (48, 16)
    shutil.copyfile(half, half.with_name("diffusion_pytorch_model.ema.safetensors"))
    refused(folder, "several variants of the weights")


def test_a_missing_shard_and_an_index_that_leaves_the_folder_are_named(folder) -> None:
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}), "utf-8")
    refused(folder, r"part-1\.safetensors: missing, the index lists it")
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}), "utf-8")
    refused(folder, "leaves the bundle|outside")
    index.write_text("{}", "utf-8")
    refused(folder, "no weight_map")


def test_types_that_no_export_stores_are_refused(folder) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t.update({"proj_out.bias": torch.zeros(32).double()}))
    refused(folder, "proj_out.bias is F64; convert the weights")


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_part_that_is_not_there_is_named(folder, part) -> None:
    shutil.rmtree(folder / part)
    refused(folder, f"{part}: no such folder; the pipeline needs it")


def test_a_tokenizer_that_is_not_there_is_named(folder) -> None:
    (folder / "tokenizer" / "spiece.model").unlink()
    refused(folder, r"neither tokenizer\.json nor spiece\.model")
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"\xff")
    refused(folder, r"tokenizer\.json: cannot be read")


@pytest.mark.parametrize("extra", ["many", -1, 1.5, True])
def test_a_count_of_sentinels_that_is_none_is_refused(folder, extra) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra}))
    refused(folder, f"extra_ids is {extra!r}")


def test_a_tokenizer_of_another_encoder_is_refused(folder) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 500}))
    refused(folder, r"5\d\d tokens, the text encoder knows 175; give the pipeline the tokenizer")


def test_a_tokenizer_that_cannot_be_read_is_named(folder) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json: not a readable tokenizer")


def test_other_pipelines_are_refused_with_those_that_work(folder) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    line = refused(folder, "'StableDiffusionPipeline' is not supported")
    for name in ("GenTronPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"):
        assert name in line


def test_what_is_found_dropped_and_owed_is_said_once_before_anything_is_written(
    folder, tmp_path
) -> None:
    said: list[str] = []

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint=folder, output=tmp_path / "out", found=said.append, planned=stop)
    assert not (tmp_path / "out").exists()
    assert said[0].startswith("found PixArt-alpha with size conditioning: 65 tensors, 2 blocks")
    assert said[1].startswith("dropped: the variance half of proj_out (kept: 4 of 8 channels")
    assert sum("use restrictions apply" in line for line in said) == 1
    assert "openrail++" in said[2]


@pytest.mark.parametrize(
    ("files", "name", "restricts"),
    [
        ({"README.md": "---\nlicense: openrail++\ntags:\n- a\n---\ntext"}, "openrail++", True),
        ({"README.md": "---\nlicense: other\nlicense_name: my-nc\n---\n"}, "my-nc", True),
        ({"README.md": "plain", "LICENSE": "\n  Apache License\n"}, "Apache License", False),
        ({"LICENSE.txt": "CreativeML Open RAIL++-M\n"}, "CreativeML Open RAIL++-M", True),
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, "apache-2.0", False),
        ({}, "", False),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_the_card_or_the_file(tmp_path, files, name, restricts) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text, "utf-8")
    found = find_licence(tmp_path)
    assert (found.name, found.restricts) == (name, restricts)
    assert set(found.files) == {f"LICENSES/{file}" for file in files}
