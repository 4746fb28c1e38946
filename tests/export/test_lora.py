"""A LoRA merged at export is the one that PEFT merges, and its provenance travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gentron.errors import BundleError, RequestError
from gentron.export.bundle_writer import export_bundle
from gentron.export.lora import parse_lora
from gentron.export.source import from_checkpoint

WIDTH, RANK = 48, 4
LAYERS = {  # layer -> (in, out)
    "transformer_blocks.0.attn1.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.attn1.to_v": (WIDTH, WIDTH),
    "transformer_blocks.1.attn2.to_k": (WIDTH, WIDTH),
    "transformer_blocks.1.attn2.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.1.ff.net.0.proj": (WIDTH, 4 * WIDTH),
    "caption_projection.linear_1": (32, WIDTH),
    "adaln_single.linear": (WIDTH, 6 * WIDTH),
    "proj_out": (WIDTH, 32),
}
# Where each of these ends up in our transformer: name and rows.
PLACES = {
    "transformer_blocks.0.attn1.to_q": ("denoiser.blocks.0.attention.to_qkv", slice(0, 48)),
    "transformer_blocks.0.attn1.to_v": ("denoiser.blocks.0.attention.to_qkv", slice(96, 144)),
    "transformer_blocks.1.attn2.to_k": ("text_projection.encoders.0.1.to_kv", slice(0, 48)),
    "transformer_blocks.1.attn2.to_out.0": ("denoiser.blocks.1.cross.to_out", slice(None)),
    "transformer_blocks.1.ff.net.0.proj": ("denoiser.blocks.1.mlp.up", slice(None)),
    "caption_projection.linear_1": ("text_projection.captions.0.inner", slice(None)),
    "adaln_single.linear": ("conditioner.shared.linear", slice(None)),
}


def matrices(seed: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.randn(RANK, i, generator=g) * 0.1, torch.randn(o, RANK, generator=g) * 0.1)
        for layer, (i, o) in LAYERS.items()
    }


@pytest.fixture
def peft_file(tmp_path) -> Path:
    """As PEFT's save_pretrained lays one out."""
    folder = tmp_path / "lora"
    folder.mkdir()
    tensors = {}
    for layer, (down, up) in matrices().items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder / "adapter_model.safetensors"


def weight(origin, name: str) -> torch.Tensor:
    return origin.read("transformer", f"{name}.weight", ())


def changes(folder: Path, *loras: str) -> dict[str, torch.Tensor]:
    """What the LoRAs add to each layer's weight."""
    before, after = from_checkpoint(folder), from_checkpoint(folder, loras)
    return {
        layer: (weight(after, name) - weight(before, name))[rows]
        for layer, (name, rows) in PLACES.items()
    }


@pytest.mark.parametrize(
    ("suffix", "scale"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0), (":0", 0.0)]
)
def test_the_merged_weight_is_the_papers_formula(pixart, peft_file, suffix, scale) -> None:
    found = changes(pixart("alpha-512").folder, f"{peft_file}{suffix}")
    for layer, (down, up) in matrices().items():
        if layer in found:
            wanted = scale * 6 / RANK * up.double() @ down.double()
            assert (found[layer].double() - wanted).abs().max() < 1e-6, layer


def test_what_the_file_does_not_touch_keeps_its_bits(pixart, peft_file) -> None:
    folder = pixart("alpha-512").folder
    before, after = from_checkpoint(folder), from_checkpoint(folder, [str(peft_file)])
    touched = {f"{name}.weight" for name, _ in PLACES.values()} | {"denoiser.final.weight"}
    for tensor in before.tensors("transformer", "F32"):
        same = torch.equal(
            tensor.read(), after.read("transformer", tensor.name, tensor.shape)
        )  # fmt: skip
        assert same == (tensor.name not in touched), tensor.name
    assert torch.equal(
        weight(before, "denoiser.blocks.0.attention.to_qkv")[48:96],
        weight(after, "denoiser.blocks.0.attention.to_qkv")[48:96],
    )


def test_the_weights_are_those_of_pefts_own_merge(pixart, pixart_script, peft_file) -> None:
    """To the bit, in float32; the rows of epsilon are those of the merged head."""
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft")
    base = pixart_script.make_transformer("alpha-512")
    base.load_state_dict(pixart("alpha-512").pipe.transformer.state_dict())
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=list(LAYERS), bias="none")
    wrapped = peft.get_peft_model(base, config)
    state = {
        f"base_model.model.{layer}.lora_{side}.default.weight": value
        for layer, pair in matrices().items()
        for side, value in zip("AB", pair, strict=True)
    }
    missing = wrapped.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    merged = wrapped.merge_and_unload().state_dict()
    origin = from_checkpoint(pixart("alpha-512").folder, [str(peft_file)])
    for layer, (name, rows) in PLACES.items():
        assert torch.equal(weight(origin, name)[rows], merged[f"{layer}.weight"]), layer
    head = merged["proj_out.weight"].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    assert torch.equal(weight(origin, "denoiser.final"), head)


def test_diffusers_layouts_give_the_same_weights(pixart, peft_file, tmp_path) -> None:
    folder = pixart("alpha-512").folder
    wanted = changes(folder, str(peft_file))
    settings = json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})
    new, old = {}, {}
    for layer, (down, up) in matrices().items():
        new[f"transformer.{layer}.lora_A.weight"], new[f"transformer.{layer}.lora_B.weight"] = (
            down,
            up,
        )
        old[f"transformer.{layer}.lora.down.weight"] = down
        old[f"transformer.{layer}.lora.up.weight"] = up
        old[f"transformer.{layer}.alpha"] = torch.tensor(6.0)
    save_file(new, tmp_path / "new.safetensors", {"lora_adapter_metadata": settings})
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "bare.safetensors")
    for name, scale in (("new", 1.0), ("old", 1.0), ("bare", RANK / 6)):
        found = changes(folder, str(tmp_path / f"{name}.safetensors"))
        for layer, change in wanted.items():
            assert (found[layer] - change * scale).abs().max() < 1e-6, (name, layer)


def test_two_are_added(pixart, peft_file) -> None:
    folder = pixart("alpha-512").folder
    twice = changes(folder, f"{peft_file}:0.25", f"{peft_file}:0.75")
    for layer, change in changes(folder, str(peft_file)).items():
        assert (twice[layer] - change).abs().max() < 1e-6


def test_alpha_may_differ_by_layer_and_rank_may_enter_by_its_root(pixart, peft_file) -> None:
    folder, file = pixart("alpha-512").folder, peft_file.with_name("adapter_config.json")
    plain = changes(folder, str(peft_file))
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"alpha_pattern": {"attn2.to_k": 12}}), "utf-8")
    special = changes(folder, str(peft_file))
    for layer, change in plain.items():
        factor = 2 if layer.endswith("attn2.to_k") else 1
        assert (special[layer] - factor * change).abs().max() < 1e-6
    file.write_text(json.dumps(settings | {"use_rslora": True}), "utf-8")
    for layer, change in changes(folder, str(peft_file)).items():
        assert (change - plain[layer] * RANK**0.5).abs().max() < 1e-6


def test_the_bundle_says_what_was_merged(pixart, peft_file, tmp_path) -> None:
    said: list[str] = []
    folder = export_bundle(
        checkpoint=pixart("alpha-512").folder,
        loras=[f"{peft_file}:0.5"],
        fp32=True,
        only=["conditioner"],
        output=tmp_path / "out",
        found=said.append,
    )
    (entry,) = json.loads((folder / "gentron.json").read_text())["provenance"]["loras"]
    assert entry["file"] == "adapter_model.safetensors"
    assert (entry["scale"], entry["layers"], entry["ranks"]) == (0.5, len(LAYERS), [RANK])
    assert len(entry["sha256"]) == 64
    assert said[-1] == f"merging adapter_model.safetensors at 0.5 into {len(LAYERS)} layers"


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8),
     ("/x:y/a.safetensors", "/x:y/a.safetensors", 1.0), ("a:-1e-1", "a", -0.1)],
)  # fmt: skip
def test_a_scale_follows_the_last_colon(text, file, scale) -> None:
    assert parse_lora(text) == (Path(file), scale)


@pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:nan", "a.safetensors:"])
def test_a_scale_that_is_no_number_is_refused(text) -> None:
    with pytest.raises(RequestError, match=r"the scale must be a number; try a\.safetensors:1\.0"):
        parse_lora(text)


TO_Q = "transformer.transformer_blocks.0.attn1.to_q"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "holds no LoRA"),
    ({f"{TO_Q}.lora_A.weight": (4, 48)}, "only one of its two matrices"),
    (
        {f"{TO_Q}.lora_A.weight": (4, 48), f"{TO_Q}.lora_B.weight": (64, 4)},
        r"is \[48, 48\], its matrices are \[4, 48\] and \[64, 4\]",
    ),
    (
        {f"{TO_Q}x.lora_A.weight": (4, 48), f"{TO_Q}x.lora_B.weight": (48, 4)},
        r"no layer transformer_blocks\.0\.attn1\.to_qx",
    ),
    ({f"{TO_Q}.lora_magnitude_vector": (48,)}, "is not part of a LoRA for this transformer"),
    ({"text_encoder.encoder.lora_A.weight": (4, 48)}, "is not part of a LoRA"),
]


@pytest.mark.parametrize(("shapes", "message"), WRONG)
def test_what_cannot_be_merged_exactly_is_refused(pixart, tmp_path, shapes, message) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(BundleError, match=message) as caught:
        from_checkpoint(pixart("alpha-512").folder, [str(file)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("bias", "all"), ("peft_type", "LOHA")]
)
def test_other_adapters_of_peft_are_refused_by_their_setting(pixart, peft_file, key, value) -> None:
    file = peft_file.with_name("adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}), "utf-8")
    with pytest.raises(BundleError, match=f"{key} {value!r} is not supported; merge it with PEFT"):
        from_checkpoint(pixart("alpha-512").folder, [str(peft_file)])


def test_a_lora_without_what_it_belongs_to_is_refused(pixart, peft_file, tmp_path) -> None:
    folder = pixart("alpha-512").folder
    peft_file.with_name("adapter_config.json").unlink()
    with pytest.raises(BundleError, match=r"adapter_config\.json: missing; PEFT's file needs it"):
        from_checkpoint(folder, [str(peft_file)])
    with pytest.raises(BundleError, match="no such file"):
        from_checkpoint(folder, [str(tmp_path / "nothing.safetensors")])
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"")
    with pytest.raises(BundleError, match="pickled weights are never read"):
        from_checkpoint(folder, [str(pickle)])
    with pytest.raises(RequestError, match="a preset has random weights"):
        export_bundle(model="tiny", loras=[str(peft_file)], output=tmp_path / "out")
