"""T5's `spiece.model` becomes a `tokenizer.json`, without a package for either format.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto. Of it T5 needs the pieces
with their scores, the index of the unknown piece and the table of character normalisation; the rest
of a T5 tokenizer is fixed (transformers' class T5Tokenizer).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gentron.errors import BundleError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
EXTRA_IDS = 100  # sentinels of T5's training, after the pieces; the encoder's vocabulary has them
UNIGRAM = 1  # TrainerSpec.ModelType
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces spell a space

Value = int | bytes


class SentencePieces(NamedTuple):
    """What a `spiece.model` says."""

    pieces: list[tuple[str, float]]  # with their log probabilities
    unknown: int
    normaliser: bytes  # the precompiled character map; empty for none


def spiece_tokenizer(file: Path, extra_ids: int = EXTRA_IDS) -> str:
    """The tokenizer.json of a T5 folder that only has `spiece.model`.

    Raises BundleError if the file is damaged or not a unigram model.
    """
    try:
        found = read_spiece(file.read_bytes())
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise BundleError(
            f"{file}: not a sentencepiece unigram model ({error}); copy it again"
        ) from error
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    vocabulary = [*found.pieces, *sentinels]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=found.unknown, byte_fallback=False))
    if found.normaliser:
        tokenizer.normalizer = normalizers.Precompiled(found.normaliser)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always", True)]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, "always", True)
    end = tokenizer.token_to_id(END)
    if end is None or tokenizer.token_to_id(PAD) is None:
        raise BundleError(f"{file}: has no {PAD} or no {END}; it is not T5's vocabulary")
    tokenizer.add_special_tokens([PAD, END, UNKNOWN, *(name for name, _ in sentinels)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, end)]
    )
    return str(tokenizer.to_str())


def read_spiece(data: bytes) -> SentencePieces:
    """Raises ValueError, IndexError or struct.error for bytes that are not such a file."""
    pieces: list[tuple[str, float]] = []
    unknown, kind, normaliser = 0, UNIGRAM, b""
    for field, value in _fields(data):
        if field == 1:  # SentencePiece: piece = 1, score = 2
            inner = dict(_fields(_message(value)))
            text, score = _message(inner.get(1, b"")), _message(inner.get(2, b"\0\0\0\0"))
            pieces.append((text.decode(), struct.unpack("<f", score)[0]))
        elif field == 2:  # TrainerSpec: model_type = 3, unk_id = 40
            inner = dict(_fields(_message(value)))
            kind, unknown = int(inner.get(3, UNIGRAM)), int(inner.get(40, 0))
        elif field == 3:  # NormalizerSpec: precompiled_charsmap = 2
            normaliser = _message(dict(_fields(_message(value))).get(2, b""))
    if kind != UNIGRAM:
        raise ValueError(f"its model type is {kind}, not unigram")
    if not 0 <= unknown < len(pieces):
        raise ValueError(f"{len(pieces)} pieces, the unknown one is number {unknown}")
    return SentencePieces(pieces, unknown, normaliser)


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where bytes are expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Numbers and values of a message's fields; a field that comes twice is yielded twice."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield field, number
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"ends inside field {field}")
        yield field, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return number, position
        if shift > 63:
            raise ValueError(f"an endless number at byte {position}")
