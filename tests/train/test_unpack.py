"""Training goes on from a packaged model: the same weights, the same latents, finished runs."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from gentron.bundle import Bundle, locate
from gentron.cli import train as command
from gentron.errors import RequestError
from gentron.model import GenTron
from gentron.train.autoencoder import train_autoencoder
from gentron.train.checkpointing import Run
from gentron.train.denoiser import IMAGE_RUN
from gentron.train.pools import STATISTICS
from gentron.train.score import autoencoder_of
from gentron.train.unpack import unpack
from gentron.train.video import NAME, from_image_model
from gentron.train.video_recipe import VIDEO_RECIPES, train_emoji_video


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked") / "run"
    return folder, unpack("emoji", folder)


def test_the_network_takes_the_unpacked_weights(unpacked):
    folder, run = unpacked
    model = GenTron(Bundle.open("emoji").config)
    state = Run(folder, run).load()
    model.load_state_dict(state["averaged"])  # strict: every tensor, and no other
    assert state["step"] == state["steps"]


def test_the_autoencoder_is_finished_and_the_bundles_own(unpacked):
    folder, _ = unpacked
    recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
    images, batch = recipe["autoencoder_images"], recipe["autoencoder_batch"]
    model = train_autoencoder(
        folder, torch.zeros(1, 4, 128, 128), ["a"], images=images, batch=batch, compile=False
    )
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    theirs = autoencoder_of(locate("emoji"))
    with torch.inference_mode():
        found, wanted = (m.encode(picture, return_dict=False)[0] for m in (model, theirs))
    assert torch.equal(found, wanted)


def test_latents_keep_their_scale(unpacked):
    vae = json.loads((locate("emoji") / "vae" / "config.json").read_text("utf-8"))
    kept = json.loads((unpacked[0] / STATISTICS).read_text("utf-8"))
    assert kept == {"mean": vae["latents_mean"], "std": vae["latents_std"]}


def test_a_folder_with_a_training_in_it_is_left_alone(unpacked):
    with pytest.raises(RequestError, match="not empty"):
        unpack("emoji", unpacked[0])


def test_without_motion_there_is_an_image_run_too(tmp_path):
    folder = tmp_path / "run"
    words = ["unpack", "emoji", "--folder", str(folder), "--without-motion"]
    ended = CliRunner().invoke(command.cli, words)
    assert ended.exit_code == 0, ended.output
    assert f"--start {IMAGE_RUN} " in ended.output
    whole, still = (Run(folder, name).load()["averaged"] for name in (NAME, IMAGE_RUN))
    assert {n for n in whole if n not in still} == {n for n in whole if ".temporal." in n}
    assert all(torch.equal(still[name], whole[name]) for name in still)
    fresh = from_image_model(Bundle.open("emoji").config, still)
    for block in fresh.denoiser.blocks:
        assert not block.temporal.to_out.weight.any()


def test_an_image_model_has_no_motion_to_leave_out(tmp_path):
    source, still = locate("emoji"), tmp_path / "still"
    (still / "transformer").mkdir(parents=True)
    (still / "vae").symlink_to(source / "vae")
    (still / "gentron.json").write_bytes((source / "gentron.json").read_bytes())
    save_file({"a": torch.zeros(1)}, still / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RequestError, match="no temporal layers; leave out --without-motion"):
        unpack(str(still), tmp_path / "run", without_motion=True)
    assert not (tmp_path / "run").exists()
    assert unpack(str(still), tmp_path / "run") == IMAGE_RUN


def test_a_bundle_of_another_recipe_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "gentron.json").write_text('{"provenance": {"seed": 0}}')
    with pytest.raises(RequestError, match="not made by this recipe"):
        unpack(str(tmp_path / "other"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_start_from_itself(unpacked):
    with pytest.raises(RequestError, match="choose another --run"):
        train_emoji_video(unpacked[0], VIDEO_RECIPES["small"], name="video", start="video")


def test_a_run_does_not_teach_itself_and_its_teacher_is_finished(unpacked):
    def run(teacher):
        train_emoji_video(unpacked[0], VIDEO_RECIPES["small"], name="next", start="video",
                          teacher=teacher)  # fmt: skip

    with pytest.raises(RequestError, match="choose another --run"):
        run("next")
    with pytest.raises(RequestError, match=r"no finished run 'tutor'; run: .* video --run tutor"):
        run("tutor")
