"""The engine cache: keyed by inputs, whole or absent, healed where it can be."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from gentron.engines.cache import ASIDE, BUILDING, EngineCache
from gentron.engines.store import ENTRY, EngineKey
from gentron.errors import BackendError, ResourceError

fork = multiprocessing.get_context("fork")


def quiet(doing: str, share: float) -> None:
    pass


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", budget=10**9)


def visible(cache: EngineCache) -> list[str]:
    return sorted(p.name for p in cache.folder.iterdir() if not p.name.startswith("."))


def hidden(cache: EngineCache, prefix: str) -> list[str]:
    return [p.name for p in cache.folder.iterdir() if p.name.startswith(prefix)]


def test_an_engine_is_built_once_and_found_ever_after(cache, scribe, job_of):
    compiler = scribe()
    first = cache.obtain(job_of(), compiler, quiet)
    again = EngineCache(cache.folder).obtain(job_of(), compiler, quiet)
    assert compiler.compiled == 1
    assert (first.fresh, again.fresh) == (True, False)
    assert again == first
    assert again.file("engine").read_bytes() == b"d1" * 1000
    assert (again.facts, again.size) == ({"layers": 3}, 2010)


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "d2"},
        {"samples": 2},
        {"precision": "fp32"},
    ],
)
def test_other_inputs_are_another_engine(cache, scribe, job_of, other):
    compiler = scribe()
    cache.obtain(job_of(), compiler, quiet)
    assert cache.find(job_of(**other), compiler) is None
    cache.obtain(job_of(**other), compiler, quiet)
    assert compiler.compiled == 2
    assert len(visible(cache)) == 2


def test_another_version_of_the_compiler_is_another_engine(cache, scribe, job_of):
    cache.obtain(job_of(), scribe(), quiet)
    assert cache.find(job_of(), scribe(version="2")) is None


def test_a_key_reads_back_as_it_was_written(scribe, job_of):
    key = EngineKey.of(job_of(), scribe())
    again = EngineKey.from_dict(json.loads(json.dumps(key.to_dict())))
    assert (again, again.digest) == (key, key.digest)


def test_default_shapes_take_an_engine_of_other_shapes_but_of_nothing_else(cache, scribe, job_of):
    built = cache.obtain(job_of(samples=4), scribe(), quiet)
    assert cache.find(job_of(samples=1), scribe()) is None
    assert cache.find(job_of(samples=1, flexible=True), scribe()) == built
    assert cache.find(job_of("d2", flexible=True), scribe()) is None


def test_nothing_is_built_where_building_is_off_and_the_command_is_named(cache, scribe, job_of):
    closed = EngineCache(cache.folder, build=False)
    with pytest.raises(BackendError, match="gentron-build bundle --backend scribe"):
        closed.obtain(job_of(), scribe(), quiet)
    cache.obtain(job_of(), scribe(), quiet)
    assert not closed.obtain(job_of(), scribe(), quiet).fresh


DAMAGE = {
    "truncated": (lambda f: (f / "engine").write_bytes(b"d1"), "truncated"),
    "edited": (lambda f: (f / "engine").write_bytes(b"d2" * 1000), "edited or damaged"),
    "missing": (lambda f: (f / "engine").unlink(), "cannot be read"),
    "no entry": (lambda f: (f / ENTRY).unlink(), "cannot be read"),
    "half an entry": (lambda f: (f / ENTRY).write_text((f / ENTRY).read_text()[:50]), "damaged"),
    "entry of a list": (lambda f: (f / ENTRY).write_text("[]"), "damaged"),
    "entry of another": (
        lambda f: (f / ENTRY).write_text((f / ENTRY).read_text().replace('"d1"', '"d9"')),
        "another engine",
    ),
    "newer format": (
        lambda f: (f / ENTRY).write_text(
            (f / ENTRY).read_text().replace('"format": 1', '"format": 2')
        ),
        "format 2, this version reads 1",
    ),
    "file outside": (
        lambda f: (f / ENTRY).write_text((f / ENTRY).read_text().replace('"engine"', '"../x"')),
        "not plain",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_engine_is_set_aside_and_built_again(cache, scribe, job_of, damage, caplog):
    change, why = DAMAGE[damage]
    compiler = scribe()
    entry = cache.obtain(job_of(), compiler, quiet)
    time.sleep(0.01)
    change(entry.folder)
    assert [problem for _, problem in cache.verify() if why in problem]
    again = cache.obtain(job_of(), compiler, quiet)
    assert compiler.compiled == 2
    assert again.file("engine").read_bytes() == b"d1" * 1000
    assert why in caplog.text
    assert hidden(cache, ASIDE)
    assert [removed.why for removed in cache.prune()] == ["set aside"]
    assert not hidden(cache, ASIDE)
    assert visible(cache) == [entry.folder.name]


def test_verify_finds_a_change_behind_unchanged_dates(cache, scribe, job_of):
    file = cache.obtain(job_of(), scribe(), quiet).file("engine")
    before = file.stat()
    file.write_bytes(b"d7" * 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    ((_, problem),) = cache.verify()
    assert problem == "engine was edited or damaged"


def test_a_rejected_engine_is_built_again(cache, scribe, job_of, caplog):
    compiler = scribe()
    cache.reject(cache.obtain(job_of(), compiler, quiet), "does not load")
    assert "does not load" in caplog.text
    cache.obtain(job_of(), compiler, quiet)
    assert compiler.compiled == 2


def raise_(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (BackendError("no kernel"), BackendError),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
    ],
)
def test_a_build_that_stops_leaves_nothing(cache, scribe, job_of, error, seen):
    with pytest.raises(seen):
        cache.obtain(job_of(), scribe(before=lambda: raise_(error)), quiet)
    assert visible(cache) == []
    assert not hidden(cache, BUILDING)


def test_a_full_disk_says_what_to_do(cache, scribe, job_of):
    full = scribe(before=lambda: raise_(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ResourceError, match=r"disk is full while building denoiser; .* --prune"):
        cache.obtain(job_of(), full, quiet)


def test_an_engine_that_fails_its_proof_is_never_kept(cache, scribe, job_of):
    def disproof(folder: Path):
        assert (folder / "engine").is_file()
        raise BackendError("not what torch computes")

    with pytest.raises(BackendError, match="torch"):
        cache.obtain(job_of(), scribe(), quiet, disproof)
    assert visible(cache) == []
    kept = cache.obtain(job_of(), scribe(), quiet, lambda folder: {"proven": True})
    assert kept.facts == {"layers": 3, "proven": True}


def _build(folder: Path, compiler, job) -> None:
    EngineCache(folder).obtain(job, compiler, quiet)


def test_two_processes_build_one_engine_once(cache, scribe, job_of, tmp_path):
    def count() -> None:
        with (tmp_path / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.3)

    compiler = scribe(before=count)
    processes = [
        fork.Process(target=_build, args=(cache.folder, compiler, job_of())) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "x"
    assert len(visible(cache)) == 1


def test_whoever_waits_for_another_process_is_told(cache, scribe, job_of):
    started = fork.Event()

    def slow() -> None:
        started.set()
        time.sleep(0.5)

    other = fork.Process(target=_build, args=(cache.folder, scribe(before=slow), job_of()))
    other.start()
    assert started.wait(60)
    told: list[str] = []
    entry = cache.obtain(job_of(), scribe(), lambda doing, share: told.append(doing))
    other.join(60)
    assert not entry.fresh
    assert told == ["another process is building it; waiting"]


def test_a_killed_build_leaves_nothing_that_a_reader_could_take_for_an_engine(
    cache, scribe, job_of
):
    started = fork.Event()

    def hang() -> None:
        started.set()
        time.sleep(60)

    process = fork.Process(target=_build, args=(cache.folder, scribe(before=hang), job_of()))
    process.start()
    assert started.wait(60)
    assert len(hidden(cache, BUILDING)) == 1
    assert cache.find(job_of(), scribe()) is None
    assert [r.why for r in cache.prune()] == []  # it is being built
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert visible(cache) == []
    assert cache.entries() == []
    entry = cache.obtain(job_of(), scribe(), quiet)  # and its lock died with it
    assert entry.fresh
    assert not hidden(cache, BUILDING)


def test_what_a_killed_build_left_is_pruned(cache, scribe, job_of):
    cache.obtain(job_of(), scribe(), quiet)
    left = cache.folder / f"{BUILDING}scribe-denoiser-fp16-0"
    left.mkdir()
    (left / "engine").write_bytes(b"12345")
    assert [(r.why, r.size) for r in cache.prune()] == [("left by a build that was killed", 5)]
    assert not left.exists()


def test_the_engines_used_longest_ago_go_first_when_the_budget_is_spent(
    cache, scribe, job_of, caplog
):
    small = EngineCache(cache.folder, budget=4500)  # two of them
    first, second = (small.obtain(job_of(d), scribe(), quiet) for d in ("d1", "d2"))
    for age, entry in ((200, first), (100, second)):
        os.utime(entry.folder / ENTRY, (time.time() - age,) * 2)
    assert small.find(job_of("d1"), scribe())  # used: now the second is the older one
    third = small.obtain(job_of("d3"), scribe(), quiet)
    assert sorted(visible(cache)) == sorted([first.folder.name, third.folder.name])
    assert "over its budget" in caplog.text


def test_the_newest_engine_stays_even_if_it_is_over_the_budget(cache, scribe, job_of):
    tiny = EngineCache(cache.folder, budget=1)
    assert tiny.obtain(job_of(), scribe(), quiet).folder.is_dir()


def test_pruning_to_nothing_removes_every_engine(cache, scribe, job_of):
    for digest in ("d1", "d2"):
        cache.obtain(job_of(digest), scribe(), quiet)
    assert len(cache.prune(budget=0)) == 2
    assert visible(cache) == []


def test_a_folder_that_others_can_write_to_is_refused(cache, scribe, job_of):
    cache.folder.mkdir()
    cache.folder.chmod(0o777)
    with pytest.raises(BackendError, match=r"others can write to .* chmod go-w"):
        cache.obtain(job_of(), scribe(), quiet)


def test_the_folder_is_made_for_its_owner_only(cache, scribe, job_of):
    entry = cache.obtain(job_of(), scribe(), quiet)
    for folder in (cache.folder, entry.folder):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_budget_that_is_no_number_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GENTRON_CACHE_BYTES", "lots")
    with pytest.raises(BackendError, match="a number of bytes, got 'lots'"):
        EngineCache(tmp_path)
