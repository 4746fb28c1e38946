"""The video recipe: starts as the image model, learns on both, resumes where it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from gentron.cli import train as command
from gentron.errors import RequestError
from gentron.model import GenTron
from gentron.presets import EMOJI
from gentron.train import video as recipe
from gentron.train.checkpointing import Run
from gentron.train.denoiser import flow_loss
from gentron.train.pools import (
    Backwards,
    ClipPool,
    LatentPool,
)
from gentron.train.video import (
    IMAGE_TIMES,
    VideoRecipe,
    caption_gap,
    clip_loss,
    ends_loss,
    from_image_model,
    make_room_for_frame_codes,
    train_video,
    video_config,
)
from gentron.train.video_recipe import VIDEO_RECIPES, sample_clips, train_emoji_video

IMAGE = replace(EMOJI.transformer, width=32, depth=2, mlp_width=64, heads=2, sample_height=4,
                sample_width=4)  # fmt: skip
LENGTH, TEXT = IMAGE.text[0].max_tokens, IMAGE.text[0].width


def a_recipe(**changed):
    small = VideoRecipe(4, 4, 1, clip_batch=2, image_batch=4, lead=0)
    return replace(small, **changed)


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


@pytest.fixture
def turned():
    torch.manual_seed(2)
    return Backwards(torch.tensor([1, 4, 6]), **texts(3))


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


def test_training_learns_resumes_and_moves_the_temporal_layers(trained, pools, turned, tmp_path):
    images, clips, null = pools
    config = video_config(IMAGE, frames=3)

    def run(folder, steps):
        return train_video(folder, config, trained.state_dict(), images, clips, turned, null,
                           a_recipe(steps=steps), compile=False,
                           provenance={"denoiser_steps": 7})  # fmt: skip

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 8)
    assert whole.denoiser.blocks[0].temporal.to_out.weight.abs().sum() > 0
    again = run(tmp_path / "whole", 8)  # finished: nothing more to do
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    kept = Run(tmp_path / "whole", "video").load(torch.device("cpu"))
    assert kept["provenance"] == {"denoiser_steps": 7}  # for a run that goes on from it


def test_a_run_goes_on_with_the_optimizer_that_it_began_with(trained, pools, turned, tmp_path):
    images, clips, null = pools

    def run(steps, optimizer):
        return train_video(tmp_path, video_config(IMAGE, frames=3), trained.state_dict(), images,
                           clips, turned, null, a_recipe(steps=steps, optimizer=optimizer),
                           compile=False)  # fmt: skip

    run(1, "muon")
    with pytest.raises(RequestError, match=r"not begun with adamw .* go on .* --optimizer"):
        run(2, "adamw")
    run(2, "muon")
    unpacked = {"step": 1, "steps": 1, "averaged": trained.state_dict(), "provenance": {}}
    Run(tmp_path, "video").save(unpacked)
    with pytest.raises(RequestError, match="choose another --run"):
        run(2, "muon")


def test_the_lead_shows_both_ends_and_both_ways(pools, turned):
    _, clips, _ = pools
    seen = []

    def forward(x, t, hidden, mask, pooled, frame_places):
        seen.append((x, t, pooled))
        assert frame_places.tolist() == [0, 2]  # of clips of three frames
        return torch.zeros_like(x)

    ends_loss(forward, clips, turned, 5, seed=0)
    (x, t, pooled), half = seen[0], 5
    assert x.shape[:2] == (10, 2)
    assert torch.equal(t[:half], t[half:])
    for k in range(half):
        row = next(r for r in turned.rows if torch.equal(clips.pooled[r].float(), pooled[k]))
        at = turned.rows.tolist().index(int(row))
        assert torch.equal(turned.pooled[at].float(), pooled[half + k])
        # The noise is the same, so what differs is the clean part, in which the ends are swapped.
        first, last = (clips.latents[row, f].float() for f in (0, 2))
        share = 1 - t[k] / 1000
        assert torch.allclose(x[k, 0] - x[half + k, 0], share * (first - last), atol=1e-5)
        assert torch.allclose(x[k, 1] - x[half + k, 1], share * (last - first), atol=1e-5)


def test_the_lead_comes_first_and_once(trained, pools, turned, tmp_path, monkeypatch):
    images, clips, null = pools
    calls, real = [], ends_loss
    monkeypatch.setattr(recipe, "ends_loss", lambda *given: calls.append(1) or real(*given))

    def run(steps, lead):
        return train_video(tmp_path, video_config(IMAGE, frames=3), trained.state_dict(), images,
                           clips, turned, null, a_recipe(steps=steps, lead=lead),
                           compile=False)  # fmt: skip

    run(3, 3)
    assert len(calls) == 3
    run(6, 3)  # resumed: the lead is over
    assert len(calls) == 3


def test_a_teacher_is_learned_from_in_place_of_the_data(trained, pools, turned, tmp_path):
    images, clips, null = pools
    other = GenTron(IMAGE).initialise()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = images, clips, turned, null

    def first_image_loss(folder, teacher):
        train_video(tmp_path / folder, video_config(IMAGE, frames=3), trained.state_dict(), *given,
                    a_recipe(steps=1, image_share=1.0), teacher=teacher,
                    compile=False)  # fmt: skip
        return json.loads((tmp_path / folder / "video.jsonl").read_text())["image_loss"]

    with torch.no_grad():
        expected = [
            float(flow_loss(trained, images, null, 4, 0, IMAGE_TIMES, teacher))
            for teacher in (None, trained, other)
        ]
    found = [first_image_loss("data", None), first_image_loss("itself", trained),
             first_image_loss("other", other)]  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert found[1] == 0 < min(found[0], found[2])


def test_hard_nouns_are_learned_from_the_data_beside_the_teacher(trained, pools, turned, tmp_path):
    images, clips, null = pools
    hard = replace(images, latents=3 * images.latents, hidden=-images.hidden)
    seen = []

    def teacher(x, t, hidden, mask, pooled):
        seen.append(len(x))
        return -trained(x, t, hidden, mask, pooled)

    train_video(tmp_path, video_config(IMAGE, frames=3), trained.state_dict(), images, clips,
                turned, null, a_recipe(steps=1, image_share=1.0, image_batch=6, optimizer="adamw"),
                teacher=teacher, hard=hard, compile=False)  # fmt: skip
    logged = json.loads((tmp_path / "video.jsonl").read_text())
    assert seen == [3]  # the teacher is asked about the other half
    torch.manual_seed(0)  # the recipe's
    again = from_image_model(video_config(IMAGE, frames=3), trained.state_dict())
    of_images = flow_loss(again, images, null, 3, 0, IMAGE_TIMES, teacher)
    of_hard = flow_loss(again, hard, null, 3, 0, IMAGE_TIMES)
    assert logged["image_loss"] == pytest.approx(of_images.item(), rel=1e-2)
    assert logged["hard_loss"] == pytest.approx(of_hard.item(), rel=1e-2)
    (0.5 * recipe.TEACHER_WEIGHT * of_images + 0.5 * of_hard).backward()
    torch.nn.utils.clip_grad_norm_(again.parameters(), 1.0)
    (adam,) = (kept["state"] for kept in Run(tmp_path, "video").load()["optimizers"])
    for name in ("denoiser.blocks.0.attention.to_qkv.weight", "denoiser.patchify.weight"):
        at = [n for n, _ in again.named_parameters()].index(name)
        expected = again.get_parameter(name).grad
        assert torch.allclose(10 * adam[at]["exp_avg"], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_padding_in_all_captions_costs_nothing_and_changes_nothing(
    trained, pools, turned, tmp_path, share, monkeypatch
):
    images, clips, null = pools
    short = torch.zeros(1, LENGTH, dtype=torch.int64)
    short[:, :11] = 1
    images, clips, turned = (
        replace(pool, mask=short.expand(len(pool.mask), -1)) for pool in (images, clips, turned)
    )
    given = images, clips, turned, (null[0], short, null[2]), a_recipe(image_share=share)
    seen = []
    forward = GenTron.forward

    def watched(self, latents, timesteps, hidden, *rest, **named):
        seen.append(hidden[0].shape[1])
        return forward(self, latents, timesteps, hidden, *rest, **named)

    monkeypatch.setattr(GenTron, "forward", watched)

    def trained_once(folder):
        train_video(tmp_path / folder, video_config(IMAGE, frames=3), trained.state_dict(), *given,
                    compile=False)  # fmt: skip
        return Run(tmp_path / folder, "video").load()["model"]

    cut = trained_once("cut")
    assert set(seen) == {16}  # of 11 tokens
    monkeypatch.setattr(recipe, "longest", lambda *pools: LENGTH)
    for name, value in trained_once("whole").items():
        assert torch.allclose(value, cut[name], atol=2e-5), name


def test_the_caption_gap_is_what_the_opposite_caption_costs(pools, turned):
    _, clips, _ = pools
    rows = turned.rows

    def blind(x, t, hidden, mask, pooled):
        return torch.zeros_like(x)

    assert caption_gap(blind, clips, turned) == 0.0
    clean = clips.latents[rows].float()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def reading(x, t, hidden, mask, pooled):
        own = torch.equal(pooled, clips.pooled[rows].float())
        assert own or torch.equal(pooled, turned.pooled.float())
        assert torch.allclose(x, torch.lerp(clean, noise, float(t[0]) / 1000), atol=1e-5)
        return noise - clean + (1.0 if own else 1.5)

    assert caption_gap(reading, clips, turned) == pytest.approx(1.25, abs=1e-3)


def test_room_for_frame_codes_tells_frames_apart_and_leaves_motion_free_rows_alike(trained, pools):
    config = video_config(IMAGE, frames=8)
    model = from_image_model(config, trained.state_dict()).eval()
    text = {k: v[:1] for k, v in texts(1).items()}
    given = ([text["hidden"].float()], [text["mask"]], text["pooled"].float())
    x = torch.randn(1, 1, IMAGE.latent_channels, 4, 4).expand(-1, 8, -1, -1, -1)

    @torch.no_grad()
    def spread(free):
        frames = model(x, torch.tensor([900.0]), *given, torch.tensor([free]))
        return float((frames - frames[:, :1]).abs().max() / frames.abs().max())

    assert spread(False) < 1e-5  # all frames are the same noise
    make_room_for_frame_codes(model, 8, seed=0)
    assert spread(False) > 0.1
    assert spread(True) < 1e-5


def test_only_an_image_model_needs_a_lead(trained):
    image = trained.state_dict()
    moving = from_image_model(video_config(IMAGE, frames=3), image).state_dict()
    recipe = a_recipe(lead=None)
    assert recipe.lead_after(image) == 300
    assert recipe.lead_after(moving) == 0
    assert replace(recipe, lead=9).lead_after(moving) == 9


def test_without_an_image_model_there_is_nothing_to_teach(tmp_path):
    with pytest.raises(RequestError, match="no finished image model; run: gentron-train emoji"):
        train_emoji_video(tmp_path / "nowhere", VIDEO_RECIPES["small"])
    assert not (tmp_path / "nowhere").exists()


def test_the_commands_options_change_the_recipe_and_nothing_else(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "gentron.train.video_recipe.train_emoji_video",
        lambda folder, recipe, **named: asked.append(recipe),
    )
    words = ["video", "--folder", str(tmp_path), "--recipe", "small", "--steps", "7",
             "--image-batch", "3", "--clip-batch", "2", "--image-share", "0.5",
             "--hard-nouns", "9", "--optimizer", "adamw"]  # fmt: skip
    ended = CliRunner().invoke(command.cli, words)
    assert ended.exit_code == 0, ended.output
    small = VIDEO_RECIPES["small"]
    assert asked == [
        replace(
            small,
            steps=7,
            image_batch=3,
            clip_batch=2,
            image_share=0.5,
            hard_nouns=9,
            optimizer="adamw",
        )
    ]


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
