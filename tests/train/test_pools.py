"""Pools of clips and captions: what is kept belongs together, and is what was asked for."""

from __future__ import annotations

import pytest
import torch

from gentron.errors import RequestError
from gentron.train import clips as clips_module
from gentron.train.clips import ClipSampler, backwards
from gentron.train.pools import CLIPS_CHUNK, SHOWN, build_backwards
from gentron.train.wording import wordings


def embedding(captions):
    """A number for each caption, in place of a text encoder."""
    numbers = torch.tensor([[float(sum(map(ord, caption)))] for caption in captions])
    return numbers[:, None], torch.ones(len(captions), 1, dtype=torch.int64), numbers


def test_captions_backwards_belong_to_their_clips(tmp_path):
    names = ["cat", "automobile", "house"]
    found = build_backwards(tmp_path, names, embedding, count=2 * CLIPS_CHUNK, seed=5,
                            device=torch.device("cpu"))  # fmt: skip
    sampler = ClipSampler(names, 5, known=wordings())
    clips = []
    for index in range(2):
        sampler.reseed(f"clips 5 {index}")
        clips += sampler.sample(CLIPS_CHUNK)
    shown = {
        k: turned for k, clip in enumerate(clips) if (turned := backwards(clip, names[clip.noun]))
    }
    assert found.rows.tolist() == list(shown)
    assert torch.equal(found.pooled, embedding([c.caption for c in shown.values()])[2].half())


def test_what_another_seed_or_version_drew_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    def build(seed):
        return build_backwards(tmp_path, ["cat", "house"], embedding, count=CLIPS_CHUNK, seed=seed,
                               device=torch.device("cpu"))  # fmt: skip

    found = build(seed=0)
    assert torch.equal(build(seed=0).pooled, found.pooled)
    assert not torch.equal(build(seed=1).rows, found.rows)  # each seed has a folder
    assert torch.equal(build(seed=0).pooled, found.pooled)
    (tmp_path / "backwards-1").rename(tmp_path / "backwards-2")
    with pytest.raises(RequestError, match=r"backwards-2: drawn with another seed .* remove it"):
        build(seed=2)
    monkeypatch.setattr(clips_module, "TRAVEL", (0.1, 0.2))
    with pytest.raises(RequestError, match="or by another version"):
        build(seed=0)
    monkeypatch.undo()
    (tmp_path / "backwards" / SHOWN).unlink()
    with pytest.raises(RequestError, match="remove it"):
        build(seed=0)
