"""Where tensors lie in safetensors files, against the format's own reader, and in damaged files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from gentron.errors import BundleError
from gentron.weights import BYTES, StoredTensor, read_header, stored_tensors

Damage = Callable[[dict[str, Any]], st.SearchStrategy[dict[str, Any]]]
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
TENSORS = {
    "blocks.0.to_q.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "blocks.0.to_q.bias": torch.full((3,), 0.5, dtype=torch.float16),
    "scale": torch.tensor(1.5, dtype=torch.bfloat16),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of three tensors, with metadata."""
    file = tmp_path / "small.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def with_header(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def bytes_of(stored: StoredTensor) -> bytes:
    return stored.file.read_bytes()[stored.offset : stored.offset + stored.length]


# --- files as they should be ---


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.dictionaries(
        st.text("ab.é/", min_size=1, max_size=6),
        st.tuples(st.sampled_from(list(TYPES)), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=5,
    )
)
def test_headers_say_what_safetensors_own_reader_says(
    tmp_path: Path, shapes: dict[str, tuple[str, list[int]]]
) -> None:
    file = tmp_path / "any.safetensors"
    save_file(
        {n: torch.ones(shape, dtype=TYPES[kind]) for n, (kind, shape) in shapes.items()}, file
    )
    ours = read_header(file)
    with safe_open(file, framework="pt") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, stored in ours.items():
            part = theirs.get_slice(name)
            assert (stored.dtype, list(stored.shape)) == (part.get_dtype(), part.get_shape())
            assert stored.length == math.prod(stored.shape) * BYTES[stored.dtype]


def test_the_offsets_are_where_the_values_are(small: Path) -> None:
    stored = read_header(small)
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        values = torch.frombuffer(bytearray(bytes_of(stored[name])), dtype=tensor.dtype)
        assert torch.equal(values.reshape(stored[name].shape), tensor)
        assert stored[name].file == small


def test_every_type_has_its_size_in_bytes() -> None:
    assert {name: kind.itemsize for name, kind in TYPES.items()} == BYTES


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    found = stored_tensors(tmp_path)
    assert {name: stored.file.name for name, stored in found.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_reading_where_tensors_lie_does_not_read_the_tensors(tmp_path: Path) -> None:
    """4 GB that are never written take no space and no time."""
    header = {"x": {"dtype": "F16", "shape": [2**31], "data_offsets": [0, 2**32]}}
    file = tmp_path / "large.safetensors"
    file.write_bytes(with_header(header, b""))
    start = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(start + 2**32)
    assert read_header(file)["x"] == StoredTensor(file, start, 2**32, "F16", (2**31,))


# --- damaged files ---


def entry(**changes: object) -> bytes:
    return with_header({"x": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **changes}})


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "shorter than a length": b"\x10\0\0",
    "a length beyond the end": struct.pack("<Q", 1000) + b"{}",
    "a huge length": struct.pack("<Q", 2**64 - 1) + b"{}" * 50,
    "a length of zero": struct.pack("<Q", 0),
    "a pickle": b"\x80\x04\x95\x1a\0\0\0\0\0\0\0}\x94(\x8c\x05state\x94K\x01u.",
    "text": b"this is not a file of tensors, but a page of HTML that a proxy returned",
    "a list": with_header([1, 2]),
    "a number": with_header(3),
    "half of an object": with_header(b'{"x":'),
    "bytes that are no text": with_header(b"\xff\xfe{}"),
    "lists without end": with_header(b"[" * 100_000),
    "an entry that is no object": with_header({"x": 3}),
    "an entry without offsets": with_header({"x": {"dtype": "F32", "shape": [1]}}),
    "offsets that are one number": entry(data_offsets=64),
    "three offsets": entry(data_offsets=[0, 32, 64]),
    "offsets that are text": entry(data_offsets=["0", "64"]),
    "offsets that are fractions": entry(data_offsets=[0.0, 64.0]),
    "an end beyond the file": entry(data_offsets=[0, 65]),
    "a start before the data": entry(data_offsets=[-8, 56]),
    "an end before the start": entry(data_offsets=[64, 0]),
    "a type that is a list": entry(dtype=["F32"]),
    "a type that nobody knows": entry(dtype="Q4_K"),
    "a shape that is a number": entry(shape=16),
    "a shape with a negative side": entry(shape=[-4, -4]),
    "a shape of more values than bytes": entry(shape=[17]),
    "a shape of fewer values than bytes": entry(shape=[15]),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        read_header(file)


def test_a_file_cut_anywhere_is_found(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"small\.safetensors"):
            read_header(small)


def test_a_file_cut_inside_a_tensor_names_the_tensor(small: Path) -> None:
    small.write_bytes(small.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"truncated inside tensor .*copy the file again"):
        read_header(small)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


fuzz = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_is_refused_or_sound(file: Path, data: bytes) -> None:
    """Either BundleError, or every tensor lies inside the file and is as long as its shape."""
    file.write_bytes(data)
    try:
        found = read_header(file)
    except BundleError as error:
        assert file.name in str(error)  # noqa: PT017
        return
    for stored in found.values():
        assert stored.offset >= 8
        assert stored.offset + stored.length <= len(data)
        assert stored.length == math.prod(stored.shape) * BYTES[stored.dtype]
        assert all(type(size) is int and size >= 0 for size in stored.shape)


@fuzz
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(save(TENSORS, metadata={"format": "pt"}))
    for place, bits in flips:
        data[place % len(data)] ^= bits
    check_is_refused_or_sound(tmp_path / "flipped.safetensors", bytes(data))


@fuzz
@given(data=st.data())
def test_an_edited_header_is_refused_or_harmless(
    tmp_path: Path, damage: Damage, data: st.DataObject
) -> None:
    raw = save(TENSORS)
    (length,) = struct.unpack("<Q", raw[:8])
    header = data.draw(damage(json.loads(raw[8 : 8 + length])))
    edited = with_header(header, raw[8 + length :])
    check_is_refused_or_sound(tmp_path / "edited.safetensors", edited)


# --- folders ---


def test_a_tensor_in_two_shards_is_refused_with_both_names(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"scale": torch.zeros(2), name[0]: torch.zeros(1)}, tmp_path / name)
    with pytest.raises(
        BundleError, match=r"b\.safetensors: tensor scale is also in a\.safetensors"
    ):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_folder_with_only_a_pickle_says_so(tmp_path: Path, name: str) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(BundleError, match=r"no \.safetensors file; pickled weights are never read"):
        stored_tensors(tmp_path)


def test_an_empty_or_missing_folder_is_refused_without_talk_of_pickles(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(BundleError, match=r"no \.safetensors file$"):
            stored_tensors(folder)
