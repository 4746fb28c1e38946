"""Engines built elsewhere: trusted by one digest, refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from gentron.engines.cache import EngineCache
from gentron.engines.folder import MANIFEST, EngineFolder, check_new, write_folder
from gentron.engines.options import engine_store
from gentron.errors import BackendError, OutputError, RequestError


def quiet(doing: str, share: float) -> None:
    pass


@pytest.fixture
def built(tmp_path, scribe, job_of):
    """A folder with one engine, and its digest."""
    cache = EngineCache(tmp_path / "cache")
    entry = cache.obtain(job_of(), scribe(), quiet)
    folder = tmp_path / "deployed"
    sha256 = write_folder(folder, [entry])
    shutil.rmtree(cache.folder)
    return folder, sha256


def test_an_engine_is_found_without_a_compile(built, scribe, job_of):
    compiler = scribe()
    entry = EngineFolder(*built).obtain(job_of(), compiler, quiet)
    assert compiler.compiled == 0
    assert entry.file("engine").read_bytes() == b"d1" * 1000


def test_the_digest_is_that_of_the_manifest(built):
    folder, sha256 = built
    assert hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == sha256
    EngineFolder(folder, sha256.upper())


def test_another_digest_is_refused(built):
    folder, sha256 = built
    with pytest.raises(BackendError, match=rf"engines.json: its sha256 is {sha256}, not 0000"):
        EngineFolder(folder, "0" * 64)


def test_an_edited_manifest_is_refused(built):
    folder, sha256 = built
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + " ")
    with pytest.raises(BackendError, match=r"engines.json: its sha256 is"):
        EngineFolder(folder, sha256)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(b"d1"), "2 bytes, the manifest says 2000: truncated or replaced"),
        (lambda f: f.write_bytes(b"d2" * 1000), "not the manifest's: edited or damaged"),
        (lambda f: f.unlink(), "No such file"),
    ],
)
def test_a_damaged_engine_is_refused_by_name(built, damage, message):
    folder, sha256 = built
    (file,) = folder.glob("*/engine")
    damage(file)
    with pytest.raises(BackendError, match=message) as refused:
        EngineFolder(folder, sha256)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "version", "why"),
    [
        ({"digest": "d2"}, "1", "made from another bundle"),
        ({}, "2", "made by version 1"),
        ({"samples": 2}, "1", "compiled for other shapes"),
        ({"precision": "fp32"}, "1", "it holds none"),
    ],
)
def test_an_engine_of_another_kind_is_refused_with_the_reason(
    built, scribe, job_of, wanted, version, why
):
    compiler = scribe(version=version)
    with pytest.raises(BackendError, match=rf"denoiser in fp\d\d \({why}\).*gentron-build BUNDLE"):
        EngineFolder(*built).obtain(job_of(**wanted), compiler, quiet)
    assert compiler.compiled == 0


def test_shapes_are_what_the_builder_chose(built, scribe, job_of):
    assert EngineFolder(*built).find(job_of(samples=7, flexible=True), scribe())


def test_an_engine_that_does_not_load_is_an_error_and_stays(built, scribe, job_of):
    store = EngineFolder(*built)
    entry = store.obtain(job_of(), scribe(), quiet)
    with pytest.raises(BackendError, match="cannot be read by this driver; build it again"):
        store.reject(entry, "cannot be read by this driver")
    assert entry.folder.is_dir()


def resealed(folder: Path, values: object) -> str:
    text = json.dumps(values).encode()
    (folder / MANIFEST).write_bytes(text)
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "values", [[], {}, {"format": 2, "engines": {}}, {"format": 1, "engines": {"../x": {}}}, 7]
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, values):
    with pytest.raises(BackendError, match="not a manifest of engines"):
        EngineFolder(tmp_path, resealed(tmp_path, values))


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(BackendError, match="the folder that gentron-build -o wrote"):
        EngineFolder(tmp_path, "0" * 64)


def test_a_folder_that_is_not_empty_is_not_written_over(built, tmp_path):
    with pytest.raises(OutputError, match="not empty; name a new folder"):
        write_folder(built[0], [])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        write_folder(tmp_path / "file", [])


def test_a_folder_and_its_digest_come_together(tmp_path):
    with pytest.raises(RequestError, match="--engines-sha256 HEX"):
        engine_store(tmp_path, None)
    with pytest.raises(RequestError, match="name it with --engines"):
        engine_store(None, "0" * 64)
    with pytest.raises(RequestError, match="64 hex digits"):
        engine_store(tmp_path, "xyz")


def test_a_copy_that_fails_leaves_nothing_half_made(tmp_path, scribe, job_of, monkeypatch):
    entry = EngineCache(tmp_path / "cache").obtain(job_of(), scribe(), quiet)

    def full(source, target):
        target.mkdir()
        (target / "engine").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("gentron.engines.folder.shutil.copytree", full)
    with pytest.raises(OutputError, match="No space left on device; name a folder on a disk with"):
        write_folder(tmp_path / "deployed", [entry])
    assert list((tmp_path / "deployed").iterdir()) == []
    check_new(tmp_path / "deployed")


def test_a_place_that_cannot_be_written_is_refused_before_a_build(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/x: cannot be written \(Not a directory\)"):
        check_new(tmp_path / "file" / "x")
    check_new(tmp_path / "some" / "where")
    assert not (tmp_path / "some").exists()
