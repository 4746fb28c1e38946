"""Clips of a bundle for `gentron-eval`: filmed through the runtime, kept in files, filmed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime import Pipeline
    from gentron.runtime.generation import Generation
    from gentron.train.clip_prompts import ClipPrompt

CLIPS = "clips"  # folder of the report
FPS = 8.0


@dataclass
class Camera:
    """Films prompts through a pipeline. With a folder, clips lie there without loss, each with its
    settings, and are read instead of filmed where bundle and settings are the same."""

    pipe: Pipeline
    options: Mapping[str, Any]  # of `Pipeline.stream`, without motion and seed
    folder: Path | None = None
    engines: dict[str, str] = field(default_factory=dict)  # what filmed the last clip
    filmed: dict[tuple[float, int, str], Any] = field(default_factory=dict)  # [F, H, W, 3] each

    def filmer(self, motion: float, seed: int) -> Callable[[Sequence[ClipPrompt]], Iterator[Any]]:
        """Clips in order, as tensors [F, 3, H, W]; the next is being filmed while one is judged.

        They stay in `filmed` as (motion, seed, text) until the caller clears it."""
        import torch

        def film(prompts: Sequence[ClipPrompt]) -> Iterator[Any]:
            pool = ThreadPoolExecutor(1)
            try:
                keys = [(motion, seed, prompt.text) for prompt in prompts]
                clips = pool.map(lambda key: self._clip(*key), keys)
                for key, clip in zip(keys, clips, strict=True):
                    self.filmed[key] = clip
                    yield torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255
            finally:
                pool.shutdown(cancel_futures=True)

        return film

    def _clip(self, motion: float, seed: int, text: str) -> Any:
        import numpy as np

        from gentron.runtime.video_file import VideoFile
        from gentron.train.prompts import noise_seed

        own = noise_seed(text, seed)  # the same noise at every motion scale
        generation = self.pipe.stream(text, seed=own, motion=motion, **self.options)
        file = self._file(text, motion, own)
        if file is not None and (kept := self._kept(file, generation)) is not None:
            return kept
        for _ in generation:
            pass
        clip = generation.result().videos[0]
        metadata = generation.metadata(0)
        self._remember(metadata)
        if file is not None:
            with VideoFile(metadata, output=file, name=file.stem, fps=FPS, format="mkv") as video:
                for frame in clip:
                    video.write(np.ascontiguousarray(frame))
        return clip

    def _file(self, text: str, motion: float, seed: int) -> Path | None:
        from gentron.runtime.image_file import default_name
        from gentron.train.report import report_folder

        if self.folder is None:
            return None
        bundle = self.pipe.bundle
        own = f"{default_name(bundle.manifest.name, 0)[:-2]}-{bundle.digest[:8]}"
        place = report_folder(self.folder / CLIPS / own / f"motion-{motion:g}")
        return place / f"{default_name(text, seed)}.mkv"

    def _kept(self, file: Path, generation: Generation) -> Any:
        """The file's frames if this very bundle filmed them with these very settings."""
        from gentron.runtime.video_file import read_frames, read_video_metadata

        if not file.is_file():
            return None
        try:
            metadata = read_video_metadata(file)
            wanted = {**vars(generation.settings), "digest": self.pipe.bundle.digest}
            if any(metadata.get(key) != value for key, value in wanted.items()):
                return None
            frames = read_frames(file)
        except RequestError:  # not a clip of ours, or damaged: filmed anew
            return None
        self._remember(metadata)
        return frames if len(frames) == generation.settings.frames else None

    def _remember(self, metadata: Mapping[str, Any]) -> None:
        engine = metadata["engines"]["denoiser"]
        self.engines = {name: engine[name] for name in ("backend", "device", "precision")}
