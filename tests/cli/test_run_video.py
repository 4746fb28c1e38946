"""`gentron-run video`: a file that carries its settings, or one clear line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import av
import numpy as np
import pytest
from PIL import Image

ASK = ("a red car", "--steps", 2, "--seed", 3, "--frames", 3)


@pytest.fixture
def film(gentron_run, tiny_video_bundle):
    return lambda *arguments: gentron_run("video", *arguments, "-m", tiny_video_bundle)


def frames_of(file):
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_one_command_writes_an_mp4_named_after_the_prompt(film, desk):
    done = film(*ASK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a-red-car-3.mp4\n"
    assert len(frames_of(desk / "a-red-car-3.mp4")) == 3
    assert [p.name for p in desk.iterdir()] == ["a-red-car-3.mp4"]


def test_the_models_own_number_of_frames_is_the_default(film, desk):
    assert film("a red car", "--steps", 1, "-o", "clip.mp4").returncode == 0
    assert len(frames_of(desk / "clip.mp4")) == 8


@pytest.mark.parametrize("suffix", ["mkv", "gif", "webp"])
def test_other_suffixes_are_other_formats(film, desk, suffix):
    assert film(*ASK, "-o", f"clip.{suffix}").returncode == 0
    assert (desk / f"clip.{suffix}").stat().st_size > 100


def test_a_folder_of_pictures_that_carry_the_settings(film, desk):
    assert film(*ASK, "--format", "png", "-o", "frames").returncode == 0
    assert [p.name for p in sorted((desk / "frames").iterdir())] == [
        f"{k:04}.png" for k in range(3)
    ]
    assert json.loads(Image.open(desk / "frames" / "0001.png").text["gentron"])["frame"] == 1


def test_like_makes_the_same_frames_again(film, desk):
    for name in ("one.mkv", "one.mp4"):
        settings = ("--motion", 1.2, "--guidance-interval", "0.3,500", "--fps", 12)
        assert film(*ASK, *settings, "-o", name).returncode == 0
    done = film("--like", "one.mp4", "-o", "two.mkv")
    assert done.returncode == 0
    assert "cannot promise" not in done.stderr
    assert all(map(np.array_equal, frames_of(desk / "one.mkv"), frames_of(desk / "two.mkv")))
    with av.open(str(desk / "two.mkv")) as container:
        assert container.streams.video[0].average_rate == 12


@pytest.mark.parametrize("name", ["one.gif", "one.webp", "frames", "frames/0001.png"])
def test_like_reads_the_settings_of_every_kind_of_file(film, desk, name):
    form = ("--format", "png") if name.startswith("frames") else ()
    assert film(*ASK, "--motion", 1.2, *form, "-o", name.split("/")[0]).returncode == 0
    assert film(*ASK, "--motion", 1.2, "-o", "one.mkv").returncode == 0
    done = film("--like", name, "-o", "two.mkv")
    assert done.returncode == 0, done.stderr
    assert "cannot promise" not in done.stderr
    assert all(map(np.array_equal, frames_of(desk / "one.mkv"), frames_of(desk / "two.mkv")))


def test_json_says_what_was_written(film):
    values = json.loads(film(*ASK, "--json").stdout)
    assert (values["file"], values["frames"], values["fps"]) == ("a-red-car-3.mp4", 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of PROMPT, --like"),
        (("a car", "--like", "x.mp4"), "exactly one of PROMPT"),
        (("a car", "--frames", 0), "must be 1 to 64"),
        (("a car", "--frames", 10**6), "must be 1 to 64 for this model"),
        (("a car", "--fps", 0), "must be above 0"),
        (("a car", "--fps", "nan"), "must be above 0"),
        (("a car", "--motion", "nan"), "motion: must be a finite number"),
        (("a car", "--guidance", "inf"), "guidance: must be a finite number"),
        (("a car", "-o", "clip.avi"), "unknown suffix '.avi'"),
        (("a car", "-o", "clip"), "unknown suffix ''"),
        (("a car", "-o", "nowhere/clip.mp4"), "no such folder"),
        (("a car", "-o", f"{'x' * 300}.mp4"), "choose another name"),
        (("a car", "--steps", 1, "--frames", 2, "-o", "/proc/clip.mp4"), "writ"),
        (("a car", "--size", "17x16"), "try 16x16"),
        (("--like", "nothing.mp4"), "no such file"),
        (("--like", "nothing.mp4", "--frames", 3), "drop --frames"),
    ],
)
def test_what_cannot_be_filmed_is_refused(refused, tiny_video_bundle, arguments, message):
    assert message in refused("video", *arguments, "-m", tiny_video_bundle)


def test_a_bundle_of_images_refuses_videos(refused, tiny_bundle):
    assert "single images" in refused("video", "a car", "--frames", 4, "-m", tiny_bundle)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "frames"])
def test_ctrl_c_while_frames_are_written_leaves_no_half_file(
    desk, tiny_video_bundle, process_line, name
):
    """Decoding is slowed down, so that there is a middle."""
    slow = (
        "import time\nfrom gentron.runtime.pipeline import Pipeline\n"
        "decode = Pipeline.decode\n"
        "Pipeline.decode = lambda *a: (time.sleep(0.1), decode(*a))[1]"
    )
    options = ["--steps", "1", "--frames", "64", "-m", str(tiny_video_bundle), "-o", name]
    options += ["--format", "png"] * (name == "frames")
    process = subprocess.Popen(process_line(slow, "video", "a car", *options), cwd=desk,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    until = time.monotonic() + 60
    while not any(desk.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    (half,) = desk.iterdir()
    assert half.name.endswith(".part")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert list(desk.iterdir()) == []


def test_a_ctrl_c_that_python_drops_is_heard_a_moment_later(desk, tiny_video_bundle, process_line):
    """Python drops what is raised in the callback of a weak reference."""
    dropped = (
        "import signal, time, weakref\nfrom gentron.runtime.pipeline import Pipeline\n"
        "decode = Pipeline.decode\n"
        "def interrupted(*given):\n"
        "    gone = set()\n"
        "    watch = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))\n"
        "    del gone\n"
        "    time.sleep(1)\n"
        "    return decode(*given)\n"
        "Pipeline.decode = interrupted"
    )
    options = ["--steps", "1", "--frames", "64", "-m", tiny_video_bundle, "-o", "frames"]
    command = process_line(dropped, "video", "a car", *options, "--format", "png")
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "Exception ignored" not in done.stderr
    assert list(desk.iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_no_half_file(desk, tiny_video_bundle, run_command_line):
    command = run_command_line("video", "a car", "--steps", "400", "--frames", "64", "-m",
                               str(tiny_video_bundle), "-o", "clip.mp4")  # fmt: skip
    process = subprocess.Popen(command, cwd=desk, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the backend is chosen: engines are loaded
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "nothing unfinished was kept" in err
    assert list(desk.iterdir()) == []
