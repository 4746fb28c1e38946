"""An imported PixArt is diffusers' network, number for number, before anything is exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor

from gentron.export.pixart_config import pixart_config
from gentron.export.pixart_tensors import pixart_rules, source_shapes
from gentron.export.source import from_checkpoint
from gentron.model import GenTron
from gentron.model import conditioning as our_conditioning
from gentron.model import denoiser as our_denoiser

KINDS = ("alpha-512", "alpha-1024", "sigma")
SIZES = ((8, 8), (6, 14), (16, 4))  # latent height and width
ROWS, FACTOR = 3, 2


def inputs(config, height: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    tokens, text_width = config.text[0].max_tokens, config.text[0].width
    length = torch.tensor([[1], [9], [tokens]])  # the empty prompt has one token
    size = torch.tensor([[height * FACTOR, width * FACTOR]]).repeat(ROWS, 1)
    return {
        "latents": torch.randn(ROWS, 4, height, width, generator=g).double(),
        "timesteps": torch.tensor([999, 500, 3]),
        "hidden": torch.randn(ROWS, tokens, text_width, generator=g).double(),
        "mask": (torch.arange(tokens)[None] < length).long(),
        "size": size.double(),
    }


def theirs(transformer: PixArtTransformer2DModel, given: dict[str, Tensor]) -> Tensor:
    """All channels of diffusers' transformer, as its pipelines call it."""
    height, width = given["size"].unbind(1)
    sizes = {"resolution": given["size"], "aspect_ratio": (height / width)[:, None]}
    with torch.inference_mode():
        return transformer(
            given["latents"],
            encoder_hidden_states=given["hidden"],
            encoder_attention_mask=given["mask"],
            timestep=given["timesteps"],
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]


def ours(model: GenTron, given: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(
            given["latents"][:, None],
            given["timesteps"],
            [given["hidden"]],
            [given["mask"]],
            size=given["size"],
        )[:, 0]


@pytest.fixture
def diffusers_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' float32 sinusoids and position codes in our network."""

    def sinusoid(positions: Tensor, features: int) -> Tensor:
        flat = get_timestep_embedding(
            positions.flatten(), features, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return flat.reshape(*positions.shape, features)

    def grid_code(
        rows: int, columns: int, width: int, base: int, interpolation: float, device: object
    ) -> Tensor:
        return get_2d_sincos_pos_embed(
            width, (rows, columns), base_size=base, interpolation_scale=interpolation
        ).float()

    monkeypatch.setattr(our_conditioning, "sinusoid", sinusoid)
    monkeypatch.setattr(our_denoiser, "grid_code", grid_code)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_import_equals_diffusers_in_float64(
    kind, size, pixart, pixart_network, diffusers_codes
) -> None:
    found = pixart(kind)
    given = inputs(found.origin.source.config, *size)
    wanted = theirs(found.pipe.transformer.double(), given)[:, :4]
    found.pipe.transformer.float()
    output = ours(pixart_network(found.origin), given)
    assert wanted.std() > 0.1
    assert (output - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_codes_cost_less_than_1e_5(kind, pixart, pixart_network) -> None:
    found = pixart(kind)
    for size in SIZES:
        given = inputs(found.origin.source.config, *size)
        wanted = theirs(found.pipe.transformer.double(), given)[:, :4]
        assert (ours(pixart_network(found.origin), given) - wanted).abs().max() < 1e-5
    found.pipe.transformer.float()


def test_what_makes_the_kinds_differ_is_seen_in_the_output(
    pixart, pixart_network, diffusers_codes
) -> None:
    """Each of these is wrong by far more than the tolerance above if it is left out."""
    found = pixart("alpha-1024")
    config = found.origin.source.config
    given = inputs(config, 6, 14)
    output = ours(pixart_network(found.origin), given)

    def differs(changed: Tensor) -> bool:
        return bool((changed - output).abs().max() > 1e-4)

    assert differs(ours(pixart_network(found.origin), given | {"size": given["size"] * 2}))
    assert differs(
        ours(pixart_network(found.origin), given | {"mask": torch.ones_like(given["mask"])})
    )
    for change in ({"position_interpolation": 1.0}, {"position_base": 32}):
        other = pixart_network(found.origin)
        other.denoiser.config = replace(config, **change)
        assert differs(ours(other, given))
    sigma_rows = theirs(found.pipe.transformer.double(), given)[:, 4:]
    found.pipe.transformer.float()
    assert differs(sigma_rows)


RELEASED: dict[str, tuple[dict[str, Any], int, int]] = {  # configuration, tensors, parameters
    "alpha-512": ({"sample_size": 64, "use_additional_conditions": False}, 603, 610_856_096),
    "alpha-1024": ({"sample_size": 128, "use_additional_conditions": True}, 611, 611_349_152),
    "sigma-1024": (
        {"sample_size": 128, "use_additional_conditions": False, "interpolation_scale": 2},
        *(603, 610_856_096),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_a_released_size_is_read_once(name: str) -> None:
    """28 blocks, 1152 wide, T5-XXL: names and shapes of diffusers' own class, without weights."""
    changes, tensors, parameters = RELEASED[name]
    with torch.device("meta"):
        reference = PixArtTransformer2DModel(caption_channels=4096, **changes)
    stored = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    config = pixart_config(
        dict(reference.config) | {"_class_name": "PixArtTransformer2DModel"},
        "config.json",
        text_width=4096,
        max_tokens=120,
        size_conditioning=bool(changes["use_additional_conditions"]),
        factor=8,
    )
    assert len(stored) == tensors
    assert sum(value.numel() for value in reference.state_dict().values()) == parameters
    assert source_shapes(config, 8) == stored
    rules = pixart_rules(config, 8)
    read = [source for rule in rules.values() for source in rule.sources]
    assert sorted(read) == sorted(stored)
    with torch.device("meta"):
        ours_named = dict(GenTron(config).named_parameters())
        made = {
            key: rule.make([torch.empty(stored[source]) for source in rule.sources])
            for key, rule in rules.items()
        }
    assert {key: tuple(value.shape) for key, value in made.items()} == {
        key: tuple(value.shape) for key, value in ours_named.items()
    }
    assert config.position_interpolation == (1 if changes["sample_size"] == 64 else 2)


@pytest.fixture(scope="module")
def sharded(pixart_script, tmp_path_factory) -> Callable[[str], Any]:
    def make(kind: str, **changes: Any) -> Any:
        folder = tmp_path_factory.mktemp("sharded") / kind
        return folder, pixart_script.write_pixart(folder, kind, shard_size="60KB", **changes)

    return make


def test_shards_and_the_older_class_name_give_the_same_network(
    sharded, pixart, pixart_network
) -> None:
    folder, _ = sharded("alpha-512")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    config = folder / "transformer" / "config.json"
    config.write_text(
        config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"), "utf-8"
    )
    one, other = pixart("alpha-512").origin, from_checkpoint(folder)
    given = inputs(one.source.config, 8, 8)
    assert torch.equal(
        ours(pixart_network(one), given), ours(pixart_network(other), given)
    )  # fmt: skip
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    shape = (32, 32)
    assert torch.equal(
        one.read("text_encoder", name, shape), other.read("text_encoder", name, shape)
    )


def test_a_head_without_variance_is_kept_whole(sharded, pixart_network) -> None:
    folder, pipe = sharded("sigma", out_channels=4)
    origin = from_checkpoint(folder)
    given = inputs(origin.source.config, 6, 8)
    wanted = theirs(pipe.transformer.double(), given)
    assert wanted.shape[1] == 4
    assert (ours(pixart_network(origin), given) - wanted).abs().max() < 1e-5
    assert "nothing is dropped" in origin.notes


def test_an_old_autoencoder_and_a_tied_embedding_are_read_by_their_new_names(
    pixart, tmp_path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    shutil.copytree(pixart("alpha-512").folder, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {
        key.replace("to_q.", "query.")
        .replace("to_k.", "key.")
        .replace("to_v.", "value.")
        .replace("to_out.0.", "proj_attn."): value
        for key, value in load_file(file).items()
    }
    assert sum(".query." in key for key in old) == 4  # weight and bias, encoder and decoder
    save_file(old, file)
    text = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(text)
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, text)
    origin, name = from_checkpoint(folder), "decoder.mid_block.attentions.0.to_q.weight"
    assert torch.equal(
        origin.read("vae", name, (16, 16)), pixart("alpha-512").origin.read("vae", name, (16, 16))
    )
    assert "shared.weight" in {t.name for t in origin.tensors("text_encoder", "F32")}
