"""The font's sprites and the scorer that knows them: a few seconds, so once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gentron.errors import RequestError
from gentron.train.scenes import find_font, load_sprites, nouns
from gentron.train.scorer import TemplateScorer


@contextmanager
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The scorer's operations are too small to share between threads; the command does the same."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def font_sprites() -> torch.Tensor:
    try:
        with single_thread():
            return load_sprites(find_font(), nouns())
    except RequestError:
        pytest.skip("needs NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")


@pytest.fixture(scope="session")
def scorer(font_sprites: torch.Tensor) -> TemplateScorer:
    return TemplateScorer(font_sprites, nouns())
