"""Training can be stopped anywhere: what is resumed equals what was never interrupted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gentron.presets import EMOJI
from gentron.train.autoencoder import new_autoencoder, psnr, train_autoencoder
from gentron.train.denoiser import (
    flow_loss,
    learning_rate,
    noise_levels,
    sigmoid_normal,
    train_denoiser,
)
from gentron.train.pools import LatentPool

SMALL = replace(EMOJI.transformer, width=32, depth=2, heads=2, mlp_width=64)


@pytest.fixture
def sprites() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    alpha = (torch.rand(3, 1, 128, 128, generator=generator) > 0.5).float()
    return torch.cat([torch.rand(3, 3, 128, 128, generator=generator) * alpha, alpha], dim=1)


@pytest.fixture(scope="module")
def pool() -> LatentPool:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.ones(32, 32, dtype=torch.int64)
    return LatentPool(normal(32, 8, 16, 16).half(), torch.zeros(8), torch.ones(8),
                      normal(32, 32, 384).half(), mask, normal(32, 384).half())  # fmt: skip


@pytest.fixture(scope="module")
def null() -> tuple[torch.Tensor, ...]:
    return torch.zeros(1, 32, 384), torch.ones(1, 32, dtype=torch.int64), torch.zeros(1, 384)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_denoiser_trained_longer_equals_one_that_was_meant_to_be(tmp_path, pool, null):
    """The shorter run's rate had fallen already; the longer one goes on from before."""
    options = {"batch": 4, "compile": False}
    whole = train_denoiser(tmp_path / "a", SMALL, pool, null, steps=6, **options)
    train_denoiser(tmp_path / "b", SMALL, pool, null, steps=3, **options)
    resumed = train_denoiser(tmp_path / "b", SMALL, pool, null, steps=6, **options)
    assert torch.equal(weights(whole), weights(resumed))
    log = [json.loads(line) for line in (tmp_path / "b" / "denoiser.jsonl").read_text().split("\n")
           if line]  # fmt: skip
    assert [row["step"] for row in log] == [6]


def test_a_denoiser_stopped_anywhere_goes_on_as_if_it_had_not(tmp_path, pool, null, monkeypatch):
    options = {"batch": 4, "compile": False, "steps": 6}
    whole = train_denoiser(tmp_path / "a", SMALL, pool, null, **options)
    monkeypatch.setattr("gentron.train.checkpointing.Run.due", lambda run: True)

    def stop(*arguments):
        if arguments[-1] == 4:  # the seed of step 4
            raise InterruptedError
        return flow_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("gentron.train.denoiser.flow_loss", stop)
        with pytest.raises(InterruptedError):
            train_denoiser(tmp_path / "b", SMALL, pool, null, **options)
    resumed = train_denoiser(tmp_path / "b", SMALL, pool, null, **options)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_resumed_autoencoder_equals_an_uninterrupted_one(tmp_path, sprites):
    names = ["cat", "dog", "owl"]
    options = {"batch": 2, "compile": False, "learning_rate": 1e-3}
    whole = train_autoencoder(tmp_path / "a", sprites, names, images=4, **options)
    # Stop after the first step by saving every step and raising from the second draw.
    train_half(tmp_path / "b", sprites, names, options)
    resumed = train_autoencoder(tmp_path / "b", sprites, names, images=4, **options)
    assert torch.allclose(weights(whole), weights(resumed), atol=0, rtol=0)


def train_half(folder, sprites, names, options):
    """Runs one of two steps: saves at once, then is interrupted while drawing the next batch."""
    from gentron.train import autoencoder

    calls, draw = [], autoencoder.draw

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "draw", interrupted)
        patch.setattr(autoencoder.Run, "due", lambda self: True)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(folder, sprites, names, images=4, **options)


def test_training_lowers_the_loss(tmp_path, pool, null):
    before = torch.stack([_loss(SMALL, pool, null, seed, None) for seed in range(4)]).mean()
    model = train_denoiser(
        tmp_path,
        SMALL,
        pool,
        null,
        steps=80,
        batch=8,
        compile=False,
        ema_decay=0.9,
        peak_rate=2e-2,
    )
    after = torch.stack([_loss(SMALL, pool, null, seed, model) for seed in range(4)]).mean()
    assert after < 0.97 * before  # white latents: only their scale can be learned this fast


def _loss(config, pool, null, seed, model):
    from gentron.model import GenTron

    with torch.no_grad():
        return flow_loss(model or GenTron(config).initialise(), pool, null, 16, 900 + seed)


def test_snapshots_see_the_averaged_network(tmp_path, pool, null):
    seen = []
    train_denoiser(
        tmp_path, SMALL, pool, null, steps=2, batch=2, compile=False,
        on_snapshot=lambda model, step: seen.append((step, weights(model).clone())),
    )  # fmt: skip
    assert [step for step, _ in seen] == [2]
    state = torch.load(tmp_path / "denoiser.pt", weights_only=True)
    saved = torch.cat([v.flatten() for v in state["averaged"].values()])
    assert torch.equal(seen[0][1], saved)


def test_the_rate_warms_up_holds_and_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in (0, 199, 599, 800, 999)]
    assert rates == pytest.approx([1 / 200, 1.0, 1.0, 0.5, 0.03], abs=0.01)


def test_the_autoencoder_maps_128_pixels_to_16_latents():
    model = new_autoencoder().eval()
    with torch.no_grad():
        latents = model.encode(torch.zeros(1, 3, 128, 128), return_dict=False)[0]
        pixels = model.decode(latents, return_dict=False)[0]
    assert latents.shape == (1, EMOJI.transformer.latent_channels, 16, 16)
    assert pixels.shape == (1, 3, 128, 128)


def test_psnr_of_a_known_error():
    target = torch.zeros(1, 3, 8, 8)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-3)  # 20 log10(2 / 0.2)


def test_training_is_watched_at_the_noise_levels_of_the_packaged_model():
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(EMOJI.scheduler)
    scheduler.set_timesteps(20)
    torch.testing.assert_close(noise_levels(20), scheduler.sigmas, rtol=0, atol=1e-6)


def test_times_are_the_sigmoid_of_the_normal_variable_that_was_asked_for():
    drawn = sigmoid_normal(20_000, (2.5, 1.5), torch.Generator().manual_seed(0)).logit()
    assert abs(drawn.mean() - 2.5) < 0.05
    assert abs(drawn.std() - 1.5) < 0.05
