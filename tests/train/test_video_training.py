"""The video recipe: starts as the image model, learns on both, resumes where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gentron.errors import RequestError
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train.pools import ClipPool, LatentPool
from gentron.train.video import clip_loss, from_image_model, train_video, video_config
from gentron.train.video_recipe import VIDEO_RECIPES, sample_clips, train_emoji_video

IMAGE = replace(EMOJI.transformer, width=32, depth=2, mlp_width=64, heads=2, sample_height=4,
                sample_width=4)  # fmt: skip
LENGTH, TEXT = IMAGE.text[0].max_tokens, IMAGE.text[0].width


def texts(count):
    return {
        "hidden": torch.randn(count, LENGTH, TEXT).half(),
        "mask": torch.ones(count, LENGTH, dtype=torch.int64),
        "pooled": torch.randn(count, TEXT).half(),
    }


@pytest.fixture
def trained():
    """An image model whose every weight matters."""
    torch.manual_seed(0)
    model = GenTron(IMAGE).initialise()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pools():
    torch.manual_seed(1)
    shape = (IMAGE.latent_channels, 4, 4)
    one = torch.ones(IMAGE.latent_channels)
    images = LatentPool(torch.randn(16, *shape).half(), mean=0 * one, std=one, **texts(16))
    clips = ClipPool(torch.randn(8, 3, *shape).half(), **texts(8))
    null = torch.zeros(1, LENGTH, TEXT), torch.ones(1, LENGTH, dtype=torch.int64)
    return images, clips, (*null, torch.zeros(1, TEXT))


def test_a_fresh_video_model_draws_the_image_models_frames(trained):
    config = video_config(IMAGE, frames=3)
    video = from_image_model(config, trained.state_dict()).eval()
    x = torch.randn(2, 3, IMAGE.latent_channels, 4, 4)
    text = texts(2)
    given = ([text["hidden"].float()], [text["mask"]], text["pooled"].float())
    t = torch.tensor([300.0, 700.0])
    together = video(x, t, *given)
    alone = torch.cat([trained(x[:, k : k + 1], t, *given) for k in range(3)], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_tensor_that_the_image_model_lacks_is_an_error(trained):
    state = trained.state_dict()
    del state["denoiser.patchify.weight"]
    with pytest.raises(KeyError, match="patchify"):
        from_image_model(video_config(IMAGE), state)


def test_text_and_motion_are_dropped_independently(pools):
    _, clips, null = pools
    seen = []

    def forward(x, t, hidden, mask, pooled, still):
        seen.append((pooled.abs().sum(1) == 0, still))
        return torch.zeros_like(x)

    for seed in range(400):
        clip_loss(forward, clips, null, 8, 0.15, seed)
    dropped, still = (torch.cat(part) for part in zip(*seen, strict=True))
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert still.float().mean() == pytest.approx(0.15, abs=0.02)
    assert (dropped & still).float().mean() == pytest.approx(0.015, abs=0.008)
    clip_loss(forward, clips, null, 8, 0.0, 0)
    assert not seen[-1][1].any()  # p = 0 trains no motion-free rows


def test_training_learns_resumes_and_moves_the_temporal_layers(trained, pools, tmp_path):
    images, clips, null = pools
    config = video_config(IMAGE, frames=3)

    def run(folder, steps):
        return train_video(folder, config, trained.state_dict(), images, clips, null, steps=steps,
                           image_batch=4, clip_batch=2, compile=False)  # fmt: skip

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 8)
    assert whole.denoiser.blocks[0].temporal.to_out.weight.abs().sum() > 0
    again = run(tmp_path / "whole", 8)  # finished: nothing more to do
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_an_image_model_there_is_nothing_to_teach(tmp_path):
    with pytest.raises(RequestError, match="no finished image model; run: gentron-train emoji"):
        train_emoji_video(tmp_path / "nowhere", VIDEO_RECIPES["small"])
    assert not (tmp_path / "nowhere").exists()


def test_watching_follows_equation_6(trained, pools):
    """With both scales 1 only the branch with text and motion counts."""
    config = video_config(IMAGE, frames=3)
    model = from_image_model(config, trained.state_dict()).eval()
    text = texts(2)
    given = (text["hidden"].float(), text["mask"], text["pooled"].float())
    null = pools[2]
    plain = sample_clips(model, given, null, frames=3, steps=2, guidance=1.0)
    guided = sample_clips(model, given, null, frames=3, steps=2, guidance=4.0)
    assert plain.shape == (2, 3, IMAGE.latent_channels, 4, 4)
    assert not torch.allclose(plain, guided)
    other = sample_clips(model, given, (null[0] + 1, null[1], null[2]), frames=3, steps=2,
                         guidance=1.0)  # fmt: skip
    assert torch.equal(plain, other)
