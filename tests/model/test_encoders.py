"""transformers' encoders and diffusers' autoencoders give through us what they give themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from gentron.config import TextConfig
from gentron.errors import BundleError
from gentron.model.text_encoder import TextEncoder, encoder_config
from gentron.model.vae import VaeDecoder, new_vae
from gentron.presets import TINY
from gentron.train.autoencoder import new_autoencoder

BERT = {
    "model_type": "bert",
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
CASES = {
    "clip": (TINY.transformer.text[0], TINY.encoders[0], transformers.CLIPTextModel),
    "t5": (TINY.transformer.text[1], TINY.encoders[1], transformers.T5EncoderModel),
    "bert": (TextConfig("bert", 32, 16, gives_pooled=True), BERT, transformers.BertModel),
}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("real_tokens", [[16, 2, 9], [1, 1, 1]])
def test_hidden_states_equal_those_of_the_stock_model(family, real_tokens):
    text, values, stock_class = CASES[family]
    torch.manual_seed(0)
    ours = TextEncoder(text, encoder_config(values)).eval()
    config = encoder_config(values)
    config._attn_implementation = "eager"
    stock = stock_class(config).eval()
    stock.load_state_dict(ours.model.state_dict(), strict=False)
    ids, mask = _prompts(text.max_tokens, real_tokens, values.get("eos_token_id", 2))
    with torch.inference_mode():
        found = ours(ids, mask)[0]
        wanted = stock(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()  # what padding positions hold is nobody's business
    assert torch.allclose(found[real], wanted[real], atol=2e-6)


def _prompts(length: int, real_tokens: list[int], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (len(real_tokens), length), generator=generator)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(real_tokens):
        mask[row, :count] = 1
        ids[row, count - 1 :] = end
    return ids, mask


def test_clip_pools_at_the_first_end_token():
    text, values, _ = CASES["clip"]
    encoder = TextEncoder(text, encoder_config(values)).eval()
    ids, mask = _prompts(16, [5, 16], 258)
    with torch.inference_mode():
        hidden, pooled = encoder(ids, mask)
    assert torch.equal(pooled, torch.stack([hidden[0, 4], hidden[1, 15]]))


def test_old_clip_configurations_pool_at_the_highest_id():
    text, values, _ = CASES["clip"]
    encoder = TextEncoder(text, encoder_config({**values, "eos_token_id": 2})).eval()
    ids, mask = _prompts(16, [5, 16], 258)
    with torch.inference_mode():
        hidden, pooled = encoder(ids, mask)
    assert torch.equal(pooled, torch.stack([hidden[0, 4], hidden[1, 15]]))


def test_bert_pools_the_mean_of_real_tokens():
    text, values, _ = CASES["bert"]
    encoder = TextEncoder(text, encoder_config(values)).eval()
    ids, mask = _prompts(16, [5, 1], 2)
    with torch.inference_mode():
        hidden, pooled = encoder(ids, mask)
    assert torch.allclose(pooled[0], hidden[0, :5].mean(0), atol=1e-6)
    assert torch.allclose(pooled[1], hidden[1, 0], atol=1e-6)


def test_an_unknown_encoder_family_is_refused():
    text, values, _ = CASES["bert"]
    with pytest.raises(BundleError, match="not one of clip, t5, bert"):
        TextEncoder(replace(text, family="gpt"), encoder_config(values))


def test_the_decoder_scales_by_the_autoencoders_own_factor():
    vae = new_vae(TINY.vae).eval()
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = VaeDecoder(vae)(latents)
        wanted = vae.decode(latents / 0.18215).sample
    assert found.shape == (2, 3, 16, 12)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_shift_and_statistics_per_channel_are_honoured():
    shifted = new_vae({**TINY.vae, "shift_factor": 0.3}).eval()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = shifted.decode(latents / 0.18215 + 0.3).sample
        assert torch.allclose(VaeDecoder(shifted)(latents), wanted, atol=1e-6)
    mean, std = [0.1 * i for i in range(8)], [1 + 0.1 * i for i in range(8)]
    config = dict(new_autoencoder().config) | {"latents_mean": mean, "latents_std": std}
    vae: nn.Module = new_vae({**config, "_class_name": "AutoencoderDC"}).eval()
    latents = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = latents * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    with torch.inference_mode():
        wanted = vae.decode(raw, return_dict=False)[0]
        assert torch.allclose(VaeDecoder(vae)(latents), wanted, atol=1e-5)


def test_a_class_that_is_no_autoencoder_is_refused():
    with pytest.raises(BundleError, match="'DDIMScheduler' is not a diffusers autoencoder"):
        new_vae({"_class_name": "DDIMScheduler"})
