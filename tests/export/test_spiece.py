"""T5's spiece.model becomes the tokenizer that transformers and sentencepiece are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gentron.errors import BundleError
from gentron.export.spiece import read_spiece, spiece_tokenizer

PROMPTS = (
    "a cat reading a newspaper",
    "",
    "  spaces\tand\nlines  ",
    "the  red   turtle",
    "ﬁne café naïve \uff46\uff55\uff4c\uff4c ½ ① ㎏",
    "猫が新聞を読む xyz Ünïcödé ЁЖИК 🐱",
    "a\u00a0cat\u200bdog, (cat)!",
)


@pytest.fixture
def file(pixart_script, tmp_path) -> Path:
    path = tmp_path / "spiece.model"
    path.write_bytes(pixart_script.spiece_model())
    return path


@pytest.mark.parametrize("prompt", [*PROMPTS, "a <extra_id_3> cat </s> on"])
def test_ids_equal_those_of_transformers(file, pixart_script, prompt) -> None:
    ours = Tokenizer.from_str(spiece_tokenizer(file))
    theirs = pixart_script.tokenizer()
    assert ours.encode(prompt).ids == theirs(prompt)["input_ids"]
    assert ours.encode(prompt).ids[-1] == 1  # the end token


def test_pieces_scores_and_the_unknown_one_are_read(file, pixart_script) -> None:
    found = read_spiece(file.read_bytes())
    wanted = pixart_script.pieces()
    assert [text for text, _ in found.pieces] == [text for text, _ in wanted]
    scores = [score for _, score in wanted]
    assert [score for _, score in found.pieces] == pytest.approx(scores, rel=1e-6)
    assert (found.unknown, found.normaliser) == (2, b"")


def test_a_trained_model_with_its_character_map_gives_the_ids_of_sentencepiece(tmp_path) -> None:
    """The map is nmt_nfkc, which T5's own file has."""
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="trains a real model: pip install sentencepiece"
    )
    draw = random.Random(0)
    words = [w for p in PROMPTS for w in p.split()] + ["".join(draw.choices("abcdefg", k=5))
                                                      for _ in range(80)]  # fmt: skip
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(400)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "t5"),
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    file = tmp_path / "t5.model"
    assert len(read_spiece(file.read_bytes()).normaliser) > 100_000
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = Tokenizer.from_str(spiece_tokenizer(file))
    for prompt in (*PROMPTS, *lines):
        assert ours.encode(prompt).ids == [*theirs.encode(prompt), 1], prompt


def test_a_file_cut_off_anywhere_is_refused_or_short_of_pieces(file) -> None:
    whole = file.read_bytes()
    complete = len(read_spiece(whole).pieces)
    for length in range(0, len(whole) - 20, 7):
        file.write_bytes(whole[:length])
        try:
            assert len(read_spiece(whole[:length]).pieces) <= complete
        except (ValueError, IndexError):
            with pytest.raises(BundleError, match=r"spiece\.model: not a sentencepiece"):
                spiece_tokenizer(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 pieces, the unknown one is number 0"),
        (b"\x12\x02\x18\x02", "its model type is 2, not unigram"),
        (b"\xff" * 40, "an endless number"),
        (b"\x0a\x7fabc", "ends inside field 1"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "a field is a number where bytes are expected"),
    ],
)
def test_what_is_not_such_a_file_is_refused_with_the_reason(tmp_path, data, message) -> None:
    file = tmp_path / "spiece.model"
    file.write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        spiece_tokenizer(file)
    assert "\n" not in str(caught.value)
    assert "copy it again" in str(caught.value)


def test_a_vocabulary_without_padding_is_not_t5s(pixart_script, tmp_path) -> None:
    file = tmp_path / "spiece.model"
    file.write_bytes(pixart_script.spiece_model().replace(b"<pad>", b"<bad>"))
    with pytest.raises(BundleError, match="it is not T5's vocabulary"):
        spiece_tokenizer(file)
