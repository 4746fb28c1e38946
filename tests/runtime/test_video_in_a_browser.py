"""Videos where they will be watched: Chromium plays the file and shows the frames that went in."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gentron.runtime.video_file import VideoFile

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FPS, COUNT, HEIGHT, WIDTH = 8, 8, 128, 128

# What the page's own <video> shows at each time, as rows of RGBA; and how playing it ends.
WATCH = """async times => {
  const video = document.querySelector('video'), canvas = document.createElement('canvas')
  video.muted = true
  const event = name => new Promise(done => video.addEventListener(name, done, {once: true}))
  // From memory: seeking over HTTP takes a server that knows ranges.
  const ready = event('canplay')
  video.src = URL.createObjectURL(await (await fetch('clip.mp4')).blob())
  await ready
  canvas.width = video.videoWidth; canvas.height = video.videoHeight
  const frames = []
  for (const time of times) {
    const there = event('seeked')
    const shown = new Promise(done => video.requestVideoFrameCallback(done))
    video.currentTime = time; await there
    // A busy machine says so before the picture is there.
    await Promise.race([shown, new Promise(done => setTimeout(done, 1000))])
    canvas.getContext('2d').drawImage(video, 0, 0)
    frames.push(Array.from(
      canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data))
  }
  const end = event('ended'); video.currentTime = 0; await video.play(); await end
  return {frames, duration: video.duration, error: video.error && video.error.message}
}"""


def moving() -> list[np.ndarray]:
    """A disc that moves over a smooth ground."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    frames = []
    for k in range(COUNT):
        ground = np.stack([60 + x, 90 + y, 200 - x], -1)
        disc = ((x - 24 - 11 * k) ** 2 + (y - 64) ** 2 < 320)[..., None]
        frames.append(np.where(disc, [214, 40, 40], ground).clip(0, 255).astype(np.uint8))
    return frames


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a page with clip.mp4 in it, next to the file."""
    (tmp_path / "index.html").write_text("<video></video><img>")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def page(site: str) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(site)
        yield tab
        browser.close()


def written(folder: Path, format: str) -> list[np.ndarray]:
    frames = moving()
    with VideoFile(
        {"prompt": "x"}, output=folder / f"clip.{format}", name="clip", fps=FPS, format=format
    ) as file:
        for frame in frames:
            file.write(frame)
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(np.float64) - b).mean()))


def test_a_browsers_video_element_shows_every_frame_in_its_colours(tmp_path, page):
    frames = written(tmp_path, "mp4")
    seen = page.evaluate(WATCH, [(k + 0.5) / FPS for k in range(COUNT)])
    assert seen["error"] is None
    assert seen["duration"] == pytest.approx(COUNT / FPS)
    shown = [np.reshape(f, (HEIGHT, WIDTH, 4))[..., :3] for f in seen["frames"]]
    likeness = np.array([[psnr(a, b) for b in frames] for a in shown])
    assert (likeness.argmax(1) == np.arange(COUNT)).all()  # each at its time
    assert likeness.diagonal().min() > 30
    mean = [np.mean(np.stack(part), (0, 1, 2)) for part in (frames, shown)]
    assert np.abs(mean[0] - mean[1]).max() < 3, mean  # the colour tags are understood


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_a_browser_shows_animations(tmp_path, page, format):
    written(tmp_path, format)
    size = page.evaluate(
        """async file => {
          const image = document.querySelector('img'); image.src = file; await image.decode()
          const data = await (await fetch(file)).arrayBuffer()
          const type = file.endsWith('gif') ? 'image/gif' : 'image/webp'
          const decoder = new ImageDecoder({data, type}); await decoder.tracks.ready
          const last = await decoder.decode({frameIndex: 7})
          return [image.naturalWidth, decoder.tracks.selectedTrack.frameCount, last.image.timestamp,
                  last.image.duration]
        }""",
        f"clip.{format}",
    )
    step = {"gif": 120_000, "webp": 125_000}[format]  # microseconds; GIF counts in hundredths
    assert size == [WIDTH, COUNT, 7 * step, step]
