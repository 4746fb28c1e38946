"""Video files: what is written is what is read again, whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from gentron.errors import OutputError, RequestError
from gentron.runtime import video_encoders
from gentron.runtime.video_file import (
    VideoFile,
    check_fps,
    check_video_target,
    read_video_metadata,
)

SETTINGS = {"prompt": "a red car — naïve \U0001f697", "seed": 7, "guidance": 7.5}


WRITE_AND_MEASURE = """
import sys
from pathlib import Path
import numpy as np
from gentron.runtime.video_file import VideoFile

def now(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

def write(count):
    with VideoFile({}, output=Path(), name="clip", fps=8, format=sys.argv[1]) as file:
        for k in range(count):
            file.write(np.roll(noise, 3 * k, 1))

noise = np.random.default_rng(0).integers(0, 3, (256, 256, 3), dtype=np.uint8) * 100
write(8)  # what is loaded once
for count in (8, 64):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = now("VmRSS")
    write(count)
    print(now("VmHWM") - before)
"""


def clip(count: int = 6, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A disc that moves over a smooth ground."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    frames = []
    for k in range(count):
        ground = np.stack([60 + 2 * x, 90 + y, 200 - x], -1)
        disc = ((x - 12 - 6 * k) ** 2 + (y - 24) ** 2 < 80)[..., None]
        frames.append(np.where(disc, [214, 40, 40], ground).clip(0, 255).astype(np.uint8))
    return frames


def written(folder: Path, name: str, frames, *, fps: float = 8, format: str | None = None) -> Path:
    output = folder / name
    chosen = check_video_target(output, 1, (frames[0].shape[1], frames[0].shape[0]), format)
    with VideoFile(SETTINGS, output=output, name="clip", fps=fps, format=chosen) as file:
        for frame in frames:
            file.write(frame)
    return file.path


def decoded(file: Path) -> list[np.ndarray]:
    if file.suffix in (".gif", ".webp"):
        with Image.open(file) as picture:
            return [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(picture)]
    if file.is_dir():
        return [np.asarray(Image.open(f)) for f in sorted(file.iterdir())]
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(
    ("name", "format", "decibels"),
    [("clip.mp4", None, 28), ("clip.gif", None, 28), ("clip.mkv", None, np.inf),
     ("clip.webp", None, np.inf), ("frames", "png", np.inf)],
)  # fmt: skip
def test_frames_come_back_in_number_order_and_colour(tmp_path, name, format, decibels):
    frames = clip()
    file = written(tmp_path, name, frames, format=format)
    again = decoded(file)
    assert len(again) == len(frames)
    assert min(psnr(a, b) for a, b in zip(again, frames, strict=True)) >= decibels
    if file.suffix == ".mp4":  # colour has half the resolution, brightness all of it
        grey = [[f @ [0.2126, 0.7152, 0.0722] for f in film] for film in (again, frames)]
        assert min(map(psnr, *grey)) > 34
    before, after = (np.mean(np.stack(f), (0, 1, 2)) for f in (frames, again))
    assert np.abs(before - after).max() < 3, (before, after)
    stored = read_video_metadata(file)
    assert {key: stored[key] for key in (*SETTINGS, "fps")} == {**SETTINGS, "fps": 8}


@pytest.mark.parametrize("size", [(1, 1), (47, 63), (256, 320)])
@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations_have_their_sizes_times_and_colours(tmp_path, name, size):
    """Read by Pillow, by FFmpeg, and byte for byte where the format says how long a part is."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 255, (5, 3), dtype=np.uint8)
    frames = [np.broadcast_to(c, (*size, 3)) for c in colours]
    file = written(tmp_path, name, frames, fps=5)
    with Image.open(file) as picture:
        assert (picture.n_frames, picture.size) == (5, size[::-1])
        assert picture.info["loop"] == 0
        for k, colour in enumerate(colours):
            picture.seek(k)
            picture.load()
            assert picture.info["duration"] == 200
            assert np.array_equal(np.asarray(picture.convert("RGB"))[0, 0], colour)
    data = file.read_bytes()
    if file.suffix == ".webp":
        assert int.from_bytes(data[4:8], "little") == len(data) - 8
    else:
        assert data[-1:] == b";"
        with av.open(str(file)) as container:
            assert len(list(container.decode(video=0))) == 5


@pytest.mark.parametrize("format", ["mp4", "mkv", "gif", "webp", "png"])
def test_the_memory_of_writing_does_not_grow_with_the_frames(tmp_path, format):
    """Peak above what the process had before, in a process of its own: 64 frames against 8."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs to start a process's peak anew")
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_MEASURE, format], cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    few, many = map(float, done.stdout.split())
    frame = 256 * 256 * 3 / 2**20  # MiB
    assert many < few + 18 * frame, (few, many)  # of 56 more


@pytest.mark.parametrize("fps", [1, 7.5, 8, 23.976, 60])
def test_mp4_is_what_browsers_play(tmp_path, fps):
    file = written(tmp_path, "clip.mp4", clip(12), fps=fps)
    with av.open(str(file)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        tags = (context.color_primaries, context.color_trc, context.colorspace)
        assert tags == (1, 1, 1)  # BT.709
        assert context.color_range == 1
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert np.allclose(np.diff(times), 1 / fps, rtol=0.01)  # constant
    data = file.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # plays before it is all there


def test_a_name_that_is_taken_gets_a_number_and_a_named_file_is_replaced(tmp_path):
    for expected in ("clip.mp4", "clip-2.mp4"):
        with VideoFile({}, output=tmp_path, name="clip", fps=8, format="mp4") as file:
            file.write(clip(1)[0])
        assert file.path == tmp_path / expected
    before = (tmp_path / "clip.mp4").read_bytes()
    written(tmp_path, "clip.mp4", clip(4))
    assert (tmp_path / "clip.mp4").read_bytes() != before
    for expected in ("clip", "clip-3"):
        with VideoFile({}, output=tmp_path, name="clip", fps=8, format="png") as file:
            file.write(clip(1)[0])
        if expected == "clip":
            (tmp_path / "clip-2").mkdir()
        assert file.path == tmp_path / expected


@pytest.mark.parametrize("format", ["mp4", "mkv", "gif", "webp", "png"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RequestError("speed", "too fast")])
def test_what_stops_in_the_middle_leaves_nothing(tmp_path, format, error):
    def film() -> None:
        with VideoFile({}, output=tmp_path, name="clip", fps=8, format=format) as file:
            file.write(clip()[0])
            file.write(clip()[1])
            raise error

    with pytest.raises((KeyboardInterrupt, RequestError)):
        film()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["mp4", "mkv", "gif", "webp", "png"])
def test_a_video_without_frames_is_no_file(tmp_path, format):
    with (
        pytest.raises(OutputError, match="no frame was written"),
        VideoFile({}, output=tmp_path, name="clip", fps=8, format=format),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, frame):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video_encoders._Mp4, "write", full)
    with (
        pytest.raises(OutputError, match="No space left on device; free some space"),
        VideoFile({}, output=tmp_path, name="clip", fps=8, format="mp4") as file,
    ):
        file.write(clip()[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "size", "format", "message"),
    [
        ("clip.avi", (64, 48), None, "unknown suffix '.avi'; videos are written as .mp4"),
        ("clip.mp4", (63, 48), None, "H.264 needs even sides, got 63x48; write .mkv"),
        ("clip.gif", (64, 48), "mp4", "is not the name of a mp4"),
        ("nowhere/clip.mp4", (64, 48), None, "no such folder; create it first"),
        ("nowhere/frames", (64, 48), "png", "no such folder"),
        ("taken", (64, 48), "png", "is there already"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_computed(
    tmp_path, output, size, format, message
):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match=message):
        check_video_target(tmp_path / output, 1, size, format)


def test_odd_sides_are_fine_where_nothing_is_subsampled(tmp_path):
    frames = clip(3, height=47, width=63)
    assert np.array_equal(decoded(written(tmp_path, "clip.mkv", frames))[1], frames[1])


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
def test_frame_rates_that_no_file_holds_are_refused(fps):
    with pytest.raises(RequestError, match="fps: must be above 0"):
        check_fps(fps)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip.png"])
def test_files_that_are_not_ours_are_refused(tmp_path, name):
    with pytest.raises(RequestError, match="no such file"):
        read_video_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a video at all" * 100)
    with pytest.raises(RequestError, match="not a readable"):
        read_video_metadata(tmp_path / name)


def test_a_video_without_settings_is_refused(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in clip(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(RequestError, match=r"carries no settings.*gentron-run image --like"):
        read_video_metadata(tmp_path / "clip.mp4")
