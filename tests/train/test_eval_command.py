"""`gentron-eval` on a bundle of random weights, and with an artist that is always right."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from gentron.cli import evaluate, filming
from gentron.cli.common import run_command
from gentron.runtime.video_file import read_frames, read_video_metadata
from gentron.train import scenes
from gentron.train.clip_prompts import clip_prompts, real_clip
from gentron.train.clips import draw_clip
from gentron.train.scenes import nouns

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--sample", "2", "--steps", "1")
NAMES = nouns()


@pytest.fixture
def gentron_eval(monkeypatch, capfd, tmp_path, font_sprites):
    """Runs the command in an empty folder; the font's sprites are drawn once for all tests."""
    monkeypatch.setattr(scenes, "load_sprites", lambda font, names: font_sprites)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gentron-eval", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(evaluate.cli)
        return (stopped.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def artist(monkeypatch, font_sprites):
    """Films what it was asked for, except that everything turns left where `mistaken`."""
    asked = {prompt.text: prompt for prompt in clip_prompts(NAMES)}
    mistaken: set[str] = set()

    def film(camera, motion, seed, text):
        prompt = asked[text]
        clip = real_clip(prompt, NAMES, seed + 100, still=prompt.motion in mistaken)
        camera.engines = {"backend": "by hand"}
        frames = (draw_clip(clip, font_sprites) + 1) / 2
        return (frames.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)

    monkeypatch.setattr(filming.Camera, "_clip", film)
    return mistaken


def test_a_perfect_artist_gets_full_marks_and_an_unmoving_one_none(
    gentron_eval, artist, tiny_video_bundle, tmp_path
):
    artist.update(("up", "bouncing"))
    code, out, err = gentron_eval(tiny_video_bundle, "--sample", 10, "--report", "report")
    assert code == 0, err
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    (model,) = report["models"]
    still = [c for c in model["clips"] if c["motion"] in ("up", "bouncing")]
    moving = [c for c in model["clips"] if c["motion"] not in ("up", "bouncing")]
    assert len(still) > 0
    assert len(moving) > 4
    assert all(c["motion_right"] for c in moving)
    assert {c["saw_motion"]["name"] for c in still} == {"standing still"}
    assert model["generated"]["groups"]["all"]["object"] == 1
    assert model["generated"]["groups"]["all"]["motion"] == len(moving) / 10
    assert report["evaluator"]["real"]["groups"]["all"]["motion"] == 1
    assert "Asked for 10 clips, tiny-video shows the thing asked for in 100.0 %" in out
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "| moving up |" in text
    assert "standing still 1" in text
    for name in ("films.webp", "trained.png", "unseen.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.width > 400
            assert getattr(picture, "n_frames", 1) == (8 if name == "films.webp" else 1)


def test_a_second_run_into_the_same_folder_films_nothing_again(
    gentron_eval, tiny_video_bundle, tmp_path
):
    arguments = (tiny_video_bundle, *QUICK, "--report", "report", "--takes", 2)
    code, out, err = gentron_eval(*arguments)
    assert code == 0, err
    assert "its weights are random" in err
    clips = sorted((tmp_path / "report" / "clips").rglob("*.mkv"))
    assert len(clips) == 4
    assert len({read_video_metadata(clip)["seed"] for clip in clips}) == 4
    assert read_frames(clips[0]).shape == (8, 16, 16, 3)
    before = {clip: clip.stat().st_mtime_ns for clip in clips}
    report = (tmp_path / "report" / "report.json").read_bytes()
    clips[0].write_bytes(clips[0].read_bytes()[:2000])
    assert gentron_eval(*arguments)[1] == out
    after = {clip: clip.stat().st_mtime_ns for clip in clips}
    assert [clip for clip in clips if before[clip] != after[clip]] == clips[:1]
    assert (tmp_path / "report" / "report.json").read_bytes() == report


def test_two_models_stand_side_by_side_at_every_motion_scale(
    gentron_eval, tiny_video_bundle, tmp_path
):
    code, out, err = gentron_eval(
        tiny_video_bundle, *QUICK, "--frames", 3, "--against", tiny_video_bundle, "--motions",
        "--report", "report",
    )  # fmt: skip
    assert code == 0, err
    header = next(line for line in out.splitlines() if "95 %" in line)
    other = f"tiny-video ({tiny_video_bundle.name})"
    for column in ("tiny-video", other, "real", "still", "noise", "other prompt's"):
        assert column in header
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert [model["label"] for model in report["models"]] == ["tiny-video", other]
    for model in report["models"]:
        assert [cell["scale"] for cell in model["motion_scales"]] == [1.0, 1.1, 1.2, 1.3]
    films = sorted((tmp_path / "report" / "clips").rglob("*.mkv"))
    by_scale = {m: [f for f in films if f.parent.name == f"motion-{m}"] for m in ("1", "1.3")}
    assert [f.name for f in by_scale["1"]] == [f.name for f in by_scale["1.3"]]  # the same seeds
    assert not all(
        np.array_equal(read_frames(a), read_frames(b))
        for a, b in zip(*by_scale.values(), strict=True)
    )
    assert (tmp_path / "report" / "motion-scales.webp").is_file()
    assert "]" + "(films-2.webp)" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_nothing_is_written_unasked(gentron_eval, tiny_video_bundle, tmp_path):
    assert gentron_eval(tiny_video_bundle, *QUICK, "--frames", 3)[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((), "gentron-train score"),
        (("--frames", "2"), "must be 3 or more"),
        (("--frames", "65"), "must be 1 to 64"),
        (("--motion", "nan"), "motion: must be a finite number"),
        (("--solver", "euler"), "solver"),
        (("--backend", "none"), "none"),
        (("--against", "nowhere"), "not found"),
        (("--font", "none.ttf"), "fonts-noto-color-emoji"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_advice(
    gentron_eval, tiny_bundle, tiny_video_bundle, tmp_path, arguments, advice
):
    bundle = tiny_video_bundle if arguments else tiny_bundle  # of images alone
    code, out, err = gentron_eval(bundle, *QUICK, *arguments, "--report", "report")
    assert (code, out) == (2, "")
    assert advice in err
    assert list(tmp_path.iterdir()) == []
