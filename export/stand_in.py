"""Tokenizers: a byte-level stand-in for models without their own, and padding for all."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gentron.config import TextConfig
from gentron.errors import BundleError


def stand_in_tokenizer(encoder: dict[str, Any]) -> str:
    """tokenizer.json in which every UTF-8 byte is a token: any text works, none means anything.

    CLIP-like encoders get begin and end tokens from their configuration, T5-like ones an end
    token 1 and padding 0, as their own tokenizers have.
    """
    begin, end, pad = (encoder.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if encoder["model_type"] == "t5":
        begin, end, pad = None, 1, 0
    special = {f"<{name}>": value for name, value in
               (("pad", pad), ("begin", begin), ("end", end)) if value is not None}  # fmt: skip
    if "<end>" in special and special["<end>"] == special.get("<pad>"):
        special.pop("<pad>")  # CLIP pads with its end token
    taken = set(special.values())
    free = (number for number in range(encoder["vocab_size"]) if number not in taken)
    vocabulary = special | dict(
        zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False)
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = " ".join(t for t in ("<begin>" if begin is not None else "", "$A", "<end>") if t)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(name, number) for name, number in special.items() if name != "<pad>"],
    )
    return str(tokenizer.to_str())


def padded_tokenizer(text: str, config: TextConfig, encoder: dict[str, Any]) -> str:
    """The same tokenizer, cutting and padding to the encoder's fixed length."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise BundleError(f"tokenizer.json: not a readable tokenizer: {error}") from error
    pad = encoder.get("pad_token_id")
    pad = 0 if pad is None else pad
    token = tokenizer.id_to_token(pad)
    if token is None:
        raise BundleError(f"tokenizer: padding token {pad} of the encoder's config is not in it")
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.enable_padding(length=config.max_tokens, pad_id=pad, pad_token=token)
    return str(tokenizer.to_str(pretty=True))
