"""What is kept of jobs, in real files: over restarts, after kills, on a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gentron.errors import KeyReusedError, RequestError, StorageError
from gentron.runtime import job_rows
from gentron.runtime.job_database import DATABASE
from gentron.runtime.job_files import FolderFiles
from gentron.runtime.job_store import JobStore
from gentron.runtime.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IMAGE,
    QUEUED,
    RUNNING,
    Job,
    Key,
    Retention,
    check_job_id,
    check_key,
    new_job_id,
)

SETTINGS = {
    "prompt": "a cat \U0001f600",
    "negative": "", "seed": 2**64 - 1, "steps": 4, "solver": "ddim", "eta": 0.1, "guidance": 4.0,
    "motion": 1.0, "width": 16, "height": 16, "frames": 1, "batch": 2,
    "guidance_interval": (0.3, float("inf")),
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
KEEP = Retention(3600.0, 1000, 100)


def job(client: str = "me", created: float | None = None) -> Job:
    output = {"format": "png", "compression": None}
    now = time.time() if created is None else created
    return Job(new_job_id(IMAGE), IMAGE, client, SETTINGS, output, "tiny", "digest", now)


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path) -> Iterator[JobStore]:
    made = JobStore(tmp_path / "jobs" if request.param == "disk" else None, KEEP)
    yield made
    made.close()


def files_of(folder: Path) -> dict[str, bytes]:
    results = folder / "results"
    return {str(f.relative_to(results)): f.read_bytes() for f in results.rglob("*") if f.is_file()}


def content(store: JobStore, made: Job, index: int) -> bytes:
    file = store.open(made.id, index)
    assert file is not None
    with file:
        return file.read()


def test_a_job_is_read_as_it_was_written(store):
    made = store.add(job())
    assert store.get(made.id, "me").request() == made.request()
    assert made.request().guidance_interval == (0.3, float("inf"))
    assert store.get(made.id, "you") is None
    assert store.delete(made.id, "you") is None


def test_a_job_ends_once(store):
    made = store.add(job())
    store.begin(made.id)
    store.progress(made.id, 3)
    assert (store.get(made.id, "me").status, store.get(made.id, "me").progress) == (RUNNING, 74)
    assert store.finish(made.id, [b"one", b"two"])
    assert not store.finish(made.id, [b"other"])
    store.fail(made.id, "late", "too late")
    found = store.get(made.id, "me")
    assert (found.status, found.progress, found.error) == (COMPLETED, 100, None)
    assert content(store, made, 1) == b"two"
    assert store.open(made.id, 2) is None


def test_what_is_deleted_while_it_runs_leaves_nothing(store, tmp_path):
    made = store.add(job())
    store.begin(made.id)
    assert store.delete(made.id, "me").id == made.id
    assert not store.finish(made.id, [b"one"])
    assert store.open(made.id, 0) is None
    if (tmp_path / "jobs").exists():
        assert files_of(tmp_path / "jobs") == {}


def test_pages_go_through_the_clients_own(store):
    made = [store.add(job(client)) for client in ("me", "you", "me", "me")]
    mine = [made[3], made[2], made[0]]
    ids = [found.id for found in mine]
    assert [j.id for j in store.page("me", IMAGE, 2)] == ids[:2]
    assert [j.id for j in store.page("me", IMAGE, 2, after=ids[1])] == ids[2:]
    assert [j.id for j in store.page("me", IMAGE, 9, newest=False)] == ids[::-1]
    assert store.page("me", IMAGE, 9, after=made[1].id) == []
    assert store.page("me", "video", 9) == []


def test_the_same_key_is_the_same_job_and_another_body_is_refused(store):
    first = store.add(job(), Key("k", "body"))
    assert store.add(job(), Key("k", "body")).id == first.id
    assert store.known(job(), Key("k", "body")).id == first.id
    with pytest.raises(KeyReusedError, match=r"^Idempotency-Key: .*take a new key"):
        store.known(job(), Key("k", "another"))
    assert store.known(job("you"), Key("k", "another")) is None


def test_a_key_that_is_cancelled_first_makes_a_cancelled_job(store):
    assert store.cancel_key("me", IMAGE, "k") is None
    late = job()
    found = store.known(late, Key("k", "body"))
    assert (found.id, found.status, found.error[0]) == (late.id, CANCELLED, "cancelled")
    assert store.known(job(), Key("k", "body")).id == late.id
    assert store.get(late.id, "me").status == CANCELLED
    assert store.known(job("you"), Key("k", "body")) is None


def test_the_key_of_a_deleted_job_is_a_cancelled_one(store):
    first = store.add(job(), Key("k", "body"))
    assert store.cancel_key("me", IMAGE, "k").id == first.id
    assert store.get(first.id, "me") is None
    with pytest.raises(KeyReusedError):
        store.add(job(), Key("k", "another"))
    assert store.add(job(), Key("k", "body")).status == CANCELLED


def test_the_oldest_go_when_there_is_too_much(store):
    made = [store.add(job()) for _ in range(3)]
    for each in made:
        assert store.finish(each.id, [b"x" * 400])
    assert [store.get(each.id, "me") is not None for each in made] == [False, True, True]
    assert store.open(made[0].id, 0) is None
    with pytest.raises(StorageError, match=r"1001 bytes, and 1000 are kept here; .*--keep-bytes"):
        store.finish(store.add(job()).id, [b"x" * 1001])


def test_ended_jobs_go_after_a_while_and_their_keys_with_them(tmp_path):
    store = JobStore(tmp_path, Retention(0.2, 1000))
    running, ended = store.add(job(created=0.0)), store.add(job(), Key("k", "body"))
    store.finish(ended.id, [b"x"])
    time.sleep(0.3)
    assert store.get(ended.id, "me") is None
    assert store.get(running.id, "me").status == QUEUED
    assert store.known(job(), Key("k", "another")) is None
    assert files_of(tmp_path) == {}
    store.close()


def test_only_so_many_ended_jobs_are_kept():
    store = JobStore(None, Retention(3600.0, 1000, 2))
    made = [store.add(job()) for _ in range(4)]
    for each in made:
        store.fail(each.id, "code", "message")
    store.add(job())
    assert sum(store.get(each.id, "me") is not None for each in made) == 2
    store.close()


def test_a_restart_goes_on_with_what_had_not_ended(tmp_path):
    store = JobStore(tmp_path)
    done, running, waiting, failed = (store.add(job(), Key(f"k{n}", "b")) for n in range(4))
    store.finish(done.id, [b"one"])
    store.begin(running.id)
    store.fail(failed.id, "deadline", "it was too late")
    store.cancel_key("me", IMAGE, "early")
    store._database._connection.close()  # as a kill does, but for the lock
    os.close(store._database._locked)
    again = JobStore(tmp_path)
    assert [each.id for each in again.left_over] == [running.id, waiting.id]
    assert {each.status for each in again.left_over} == {QUEUED}
    assert content(again, done, 0) == b"one"
    assert again.get(failed.id, "me").error == ("deadline", "it was too late")
    assert again.known(job(), Key("k0", "b")).id == done.id
    assert again.known(job(), Key("early", "b")).status == CANCELLED
    again.close()


def test_a_job_that_takes_the_process_with_it_is_given_up(tmp_path):
    made = None
    for _ in range(3):
        store = JobStore(tmp_path, most_attempts=3)
        made = made or store.add(job())
        assert store.get(made.id, "me").status == QUEUED
        store.begin(made.id)
        store.close()
    store = JobStore(tmp_path, most_attempts=3)
    assert store.left_over == []
    assert store.get(made.id, "me").error[0] == "interrupted"
    store.close()


def test_a_job_that_was_left_in_order_is_not_counted_as_interrupted(tmp_path):
    made = None
    for _ in range(4):
        store = JobStore(tmp_path, most_attempts=2)
        made = made or store.add(job())
        store.begin(made.id)
        store.leave(made.id)
        store.close()
    assert [each.id for each in JobStore(tmp_path, most_attempts=2).left_over] == [made.id]


def test_one_process_at_a_time(tmp_path):
    store = JobStore(tmp_path)
    with pytest.raises(StorageError, match=rf"process {os.getpid()}\) .*another folder with --job"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_a_folder_that_is_not_ours_is_one_clear_error(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"x" * 5000)
    with pytest.raises(StorageError, match="is damaged; move it away"):
        JobStore(tmp_path)
    (tmp_path / DATABASE).unlink()
    with sqlite3.connect(tmp_path / DATABASE) as other:
        other.execute("CREATE TABLE a (b)")
    other.close()
    with pytest.raises(StorageError, match="another program or version; give another folder"):
        JobStore(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--jobs"):
        JobStore(tmp_path / "file")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from NAME import files_of, job
from gentron.runtime import job_rows
from gentron.runtime.job_store import JobStore

folder = Path(sys.argv[1])

def finish(point):
    calls = 0

    def counted(call):
        def at(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return at

    store = JobStore(folder, most_attempts=100)
    made = store.left_over[0] if store.left_over else store.add(job())
    store.begin(made.id)
    os.fsync, Path.rename, Path.mkdir = map(counted, (os.fsync, Path.rename, Path.mkdir))
    job_rows.end, job_rows.forget = counted(job_rows.end), counted(job_rows.forget)
    store.finish(made.id, [b"one" * 50_000, b"two"])
    store.close()

outcome, point, found = None, 0, []
while outcome != 0:
    point += 1
    child = os.fork()
    if not child:
        finish(point)
        os._exit(0)
    outcome = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sizes = [len(c) for name, c in files_of(folder).items() if not name.startswith(".")]
    store = JobStore(folder, most_attempts=100)
    found.append((outcome, sorted(sizes), len(store.left_over), len(files_of(folder))))
    store.close()
print(json.dumps(found))
"""


def test_files_are_whole_or_absent_wherever_the_process_is_killed(tmp_path):
    """At every step of keeping a result, one after the other, on the same folder."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED.replace("NAME", Path(__file__).stem), tmp_path],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert len(killed) >= 8
    for outcome, visible, left, kept in killed:
        assert (outcome, left, kept) == (-signal.SIGKILL, 1, 0)
        assert visible in ([], [3, 150_000])
    assert [3, 150_000] in [visible for _, visible, *_ in killed]
    assert last == [0, [3, 150_000], 0, 2]
    with sqlite3.connect(tmp_path / DATABASE) as database:
        outcomes = [row[0] for row in database.execute("SELECT outcome FROM attempts")]
    database.close()
    assert outcomes == ["interrupted"] * len(killed) + [COMPLETED]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """2 MB of memory as a file system, where that may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Until there is no space."""
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


def add_many(store: JobStore) -> None:
    for _ in range(100):  # the log of the database may have some room left
        store.add(job())


def test_a_full_disk_is_told_and_passes(small_disk):
    """A real one: what cannot be kept is refused, what ended is known, and is written later."""
    store = JobStore(small_disk / "jobs")
    running = store.add(job())
    store.begin(running.id)
    ballast = small_disk / "ballast"
    fill(ballast)
    with pytest.raises(StorageError, match=r"No space left .*free some space, or keep less"):
        store.finish(running.id, [b"x" * 100_000])
    assert files_of(small_disk / "jobs") == {}
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        add_many(store)
    store.fail(running.id, "storage", "the disk is full")
    assert store.get(running.id, "me").status == FAILED
    store.begin(running.id)
    ballast.unlink()
    later = store.add(job())
    assert store.finish(later.id, [b"x" * 100_000])
    assert store.get(running.id, "me").error == ("storage", "the disk is full")
    store.close()
    again = JobStore(small_disk / "jobs")
    assert again.get(running.id, "me").error == ("storage", "the disk is full")
    again.close()


def test_a_write_that_fails_leaves_no_part_of_it(tmp_path, monkeypatch):
    files = FolderFiles(tmp_path)
    calls = iter([None, OSError(errno.ENOSPC, "No space left on device")])
    monkeypatch.setattr(os, "fsync", lambda handle: raise_(next(calls)))
    with pytest.raises(OSError, match="No space"):
        files.write("image_0", [b"one", b"two"])
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_recorded_leaves_no_files(tmp_path, monkeypatch):
    store = JobStore(tmp_path)
    made = store.add(job())
    with monkeypatch.context() as patch:
        patch.setattr(job_rows, "forget", lambda *_: raise_(sqlite3.OperationalError("odd")))
        with pytest.raises(StorageError, match="odd; check the disk and who may write there"):
            store.finish(made.id, [b"one"])
    assert (files_of(tmp_path), store.get(made.id, "me").status) == ({}, QUEUED)
    assert store.finish(made.id, [b"one"])
    store.close()


def raise_(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_ids_and_keys_are_what_they_say():
    assert check_job_id(IMAGE, "image_00ff") == "image_00ff"
    for wrong in ("image_", "video_00", "image_../x", "image_" + "0" * 33, "image_0\n"):
        with pytest.raises(RequestError, match=r"^image_id"):
            check_job_id(IMAGE, wrong)
    assert check_key("a-b_c.9") == "a-b_c.9"
    for wrong in ("", "a b", "é", "k" * 256, "a\n"):
        with pytest.raises(RequestError, match=r"^Idempotency-Key"):
            check_key(wrong)
