"""The manifest: unsafe paths, other versions, wrong fields, and random damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gentron.bundle import FORMAT, MANIFEST, Bundle, Manifest
from gentron.errors import BundleError

Damage = Callable[[dict[str, Any]], st.SearchStrategy[dict[str, Any]]]
WHERE = Path("gentron.json")


def manifest_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return values


UNSAFE = (
    *("../outside.json", "vae/../../outside.json", "..", "/etc/passwd", "//host/share/x"),
    *("..\\outside.json", "vae\\config.json", "C:/outside.json", "c:outside.json", "", "."),
)


@pytest.mark.parametrize("name", UNSAFE)
def test_a_path_that_could_leave_the_bundle_is_refused(tiny_bundle: Path, name: str) -> None:
    values = manifest_of(tiny_bundle)
    values["files"][name] = {"sha256": "0" * 64, "size": 1}
    with pytest.raises(BundleError, match="leaves the bundle; do not use this bundle") as caught:
        Manifest.from_json(json.dumps(values), WHERE)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "C:\\probe"])
def test_a_probe_that_lies_outside_the_bundle_is_refused(tiny_bundle: Path, name: str) -> None:
    values = manifest_of(tiny_bundle)
    values["probes"]["denoiser"] = name
    with pytest.raises(BundleError, match=r"leaves the bundle|not among its files"):
        Manifest.from_json(json.dumps(values), WHERE)


@pytest.mark.parametrize("found", [FORMAT + 1, 99, 10**30])
def test_a_newer_format_is_said_before_its_other_changes_are(found: int) -> None:
    message = rf"^gentron\.json: bundle format {found} is newer than .*; upgrade gentron$"
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps({"format": found, "everything": "else"}), WHERE)


@pytest.mark.parametrize("found", [FORMAT - 1, -7])
def test_an_older_format_asks_for_another_export(found: int) -> None:
    message = rf"^gentron\.json: bundle format {found} is older than .*; export the bundle again$"
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps({"format": found}), WHERE)


@pytest.mark.parametrize("found", [True, 1.0, 2.5, float("inf"), "1", "2", None, [1], {}])
def test_a_format_that_is_no_whole_number_is_no_manifest(tiny_bundle: Path, found: Any) -> None:
    """Among them values that Python takes for equal to 1."""
    text = json.dumps(manifest_of(tiny_bundle) | {"format": found})
    message = r"^gentron\.json: not a valid manifest \(.*format is .*, not a whole number\); export"
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text, WHERE)


FIELDS = (
    *("name", "weights", "storage", "precisions", "defaults", "provenance", "licences"),
    *("files", "contract", "probes", "version", "format"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(tiny_bundle: Path, field: str) -> None:
    values = manifest_of(tiny_bundle)
    assert set(values) == set(FIELDS)
    del values[field]
    with pytest.raises(BundleError, match=f"not a valid manifest .*'{field}'.*export the bundle"):
        Manifest.from_json(json.dumps(values), WHERE)


WRONG_TYPES: list[tuple[str, Any]] = [
    *(("precisions", 3), ("precisions", {"denoiser": 3}), ("probes", 3), ("files", [])),
    *(("files", {"a": 3}), ("files", {"a": {"sha256": "0"}}), ("licences", 3)),
    *(("files", {"a": {"sha256": "0", "size": "big"}}), ("provenance", 3), ("contract", 3)),
    ("files", {"a": {"sha256": "0", "size": float("inf")}}),
    *(("defaults", {"hats": 3}), ("defaults", 3), ("format", None), ("format", [1])),
    *(("name", None), ("weights", "excellent"), ("storage", 16)),
    ("defaults", {"solver": "ddim", "steps": "many", "guidance": 4.5, "motion": 1.0}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_field_of_the_wrong_type_is_refused(tiny_bundle: Path, field: str, value: Any) -> None:
    values = manifest_of(tiny_bundle)
    values[field] = value
    with pytest.raises(BundleError, match=r"^gentron\.json: "):
        Manifest.from_json(json.dumps(values), WHERE)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "<html>", "[" * 100_000, '{"a": \n'])
def test_a_manifest_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"^gentron\.json: not a valid manifest"):
        Manifest.from_json(text, WHERE)


# --- random damage ---

fuzz = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_is_refused_or_opens(folder: Path, manifest: bytes) -> None:
    """Any other exception than BundleError fails the test."""
    (folder / MANIFEST).write_bytes(manifest)
    try:
        bundle = Bundle.open(folder, verify="sizes")
    except BundleError:
        return
    assert bundle.path == folder.resolve()


@fuzz
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    kept=st.none() | st.floats(0, 1),
)
def test_flipped_and_cut_manifests_are_refused_or_open(
    tiny_copy: Path, tiny_bundle: Path, flips: list[tuple[int, int]], kept: float | None
) -> None:
    data = bytearray((tiny_bundle / MANIFEST).read_bytes())
    for place, bits in flips:
        data[place % len(data)] ^= bits
    if kept is not None:
        data = data[: int(kept * len(data))]
    check_is_refused_or_opens(tiny_copy, bytes(data))


@fuzz
@given(data=st.data())
def test_edited_manifests_are_refused_or_open(
    tiny_copy: Path, tiny_bundle: Path, damage: Damage, data: st.DataObject
) -> None:
    edited = data.draw(damage(manifest_of(tiny_bundle)))
    check_is_refused_or_opens(tiny_copy, json.dumps(edited).encode())
