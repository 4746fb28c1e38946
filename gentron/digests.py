"""sha256 of files, remembered: a file is read again only where it could have changed.

What is remembered lies in the user's cache folder and only ever saves time: where it is missing,
damaged, not to be trusted or not to be written, files are read, and one warning says why.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gentron.errors import BundleError

log = logging.getLogger(__name__)

MEMORY = "digests-1.json"  # the number is that of its layout
MAX_ENTRIES = 2000  # 350 kB at most; about 40 bundles
MAX_SIZE = 2**20  # bytes of a memory that is read at all
LARGE = 1_000_000_000  # bytes; from here on, reading takes seconds
SETTLED_NS = 2_000_000_000  # the coarsest timestamps there are, FAT's
DAMAGED = (ValueError, TypeError, RecursionError)  # what wrong contents of a memory raise


class Identity(NamedTuple):
    """What the system keeps of a file, and changes when its contents change.

    ctime is part of it because any program can set mtime back, but none can set ctime. Renaming a
    folder keeps all five; a copy, a chmod or a rename of the file itself costs one reading.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def settled(self, now_ns: int) -> bool:
        """Whether a change from `now_ns` on would show.

        A file edited right after it was read can keep its times, which are only as fine as the
        filesystem's clock (git calls such entries racy). So a file that changed within the last
        two seconds, or carries a date to come, is not remembered and is read again next time.
        """
        return now_ns - max(self.mtime_ns, self.ctime_ns) > SETTLED_NS


class Reading(NamedTuple):
    """A digest, and the file it was taken from."""

    sha256: str
    identity: Identity
    lasting: bool  # as long as the identity is the same, so is the digest


def read_digest(file: Path) -> Reading:
    """Reads the whole file; raises OSError."""
    now = time.time_ns()
    with file.open("rb") as stream:
        # Taken before the first byte: whoever changes the file while it is read changes this too.
        identity = Identity.of(os.fstat(stream.fileno()))
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Reading(sha256, identity, lasting=identity.settled(now))


def first_differing(folder: Path, digests: Mapping[str, str], *, anew: bool = False) -> str | None:
    """The first name whose file has another sha256 than given, or None.

    With `anew` every file is read. Without, a file is taken as read whose remembered digest is the
    one given; memory alone never refuses a file. Raises BundleError for what cannot be read.
    """
    known = {} if anew else _recall()
    unread: dict[str, int] = {}  # name -> size
    fresh: dict[Identity, str] = {}
    try:
        for name, sha256 in digests.items():
            identity = Identity.of((folder / name).stat())
            if known.get(identity) != sha256:
                unread[name] = identity.size
        if (total := sum(unread.values())) > LARGE:
            # A warning, because Python shows nothing milder unless a program asks for it.
            log.warning(
                f"{folder}: reading {total / 1e9:.1f} GB to check its files; the next start reads "
                "only what has changed"
            )
        for name in unread:
            reading = read_digest(folder / name)
            if reading.lasting:
                fresh[reading.identity] = reading.sha256
            if reading.sha256 != digests[name]:
                return name
    except OSError as error:
        raise BundleError(
            f"{error.filename or folder}: cannot be read: {error.strerror or error}; "
            "check its permissions, or copy the bundle again"
        ) from error
    finally:  # also after a damaged file or an interruption, what was read was read
        _remember(fresh)
    return None


def remember(digests: Mapping[Path, str]) -> None:
    """For a writer of files that has computed their sha256 on the way: spares the first reading.

    The caller answers for nobody else having touched the files since. Those changed within the
    last two seconds are left out (see `Identity.settled`), so call this as late as possible.
    Raises OSError for a file that is not there.
    """
    now = time.time_ns()
    found = {Identity.of(file.stat()): sha256 for file, sha256 in digests.items()}
    _remember({identity: sha256 for identity, sha256 in found.items() if identity.settled(now)})


def _recall() -> dict[Identity, str]:
    folder = cache_folder()
    try:
        _check_folder(folder)
        return _load(folder / MEMORY)
    except OSError as error:
        _warn_unusable(folder, error)
    except DAMAGED as error:
        _warn_once(f"{folder / MEMORY}: damaged ({error}); every file is read and it is rewritten")
    return {}


def _remember(fresh: Mapping[Identity, str]) -> None:
    """Adds to what is remembered by now: another process may have written since `_recall`."""
    if not fresh:
        return
    folder = cache_folder()
    try:
        _check_folder(folder)
        # Each with its mode: parents made on the way get the umask's, which can be too open.
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_folder(folder)
        try:
            old = _load(folder / MEMORY)
        except (OSError, *DAMAGED):
            old = {}
        replaced = {(identity.device, identity.inode) for identity in fresh}
        kept = {i: d for i, d in old.items() if (i.device, i.inode) not in replaced}
        _write(folder / MEMORY, {**kept, **fresh})
    except OSError as error:
        _warn_unusable(folder, error)


def _load(file: Path) -> dict[Identity, str]:
    """Oldest first; empty if there is no file."""
    try:
        found = check_own(file)
    except FileNotFoundError:
        return {}
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_SIZE:
        raise ValueError("not a file of its kind and size")
    memory: dict[Identity, str] = {}
    for *numbers, sha256 in json.loads(file.read_bytes()):
        if len(numbers) != len(Identity._fields) or any(type(n) is not int for n in numbers):
            raise ValueError(f"no five whole numbers: {numbers!r:.80}")
        if not isinstance(sha256, str):
            raise ValueError(f"no digest: {sha256!r:.80}")
        memory[Identity(*numbers)] = sha256
    return memory


def _write(file: Path, memory: Mapping[Identity, str]) -> None:
    """All or nothing, so that a reader or a crash never meets half a file."""
    rows = [[*identity, sha256] for identity, sha256 in memory.items()][-MAX_ENTRIES:]
    handle, partial = tempfile.mkstemp(prefix=f"{MEMORY}.", dir=file.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            json.dump(rows, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def cache_folder() -> Path:
    """`gentron` in the user's cache folder, there or not."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which the XDG specification says to ignore
        base = Path(os.path.expanduser("~"), ".cache")
    return base / "gentron"


def _check_folder(folder: Path) -> None:
    """Raises OSError if what lies in it is not to be trusted; a missing one is fine."""
    if not folder.is_absolute():
        raise FileNotFoundError("no home folder is known")
    for each in (folder.parent, folder):
        with contextlib.suppress(FileNotFoundError):
            check_own(each)


def check_own(path: Path) -> os.stat_result:
    """Raises OSError unless `path` is there and only its owner, who we are, can write to it.

    Elsewhere another user could have a wrong digest remembered as right, or their engine loaded.
    """
    found = path.stat()
    if hasattr(os, "getuid"):  # not on Windows, which keeps a profile to its user
        if found.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others can write to {path}; run: chmod go-w '{path}'")
    return found


def _warn_unusable(folder: Path, error: OSError) -> None:
    _warn_once(
        f"{folder}: what was checked cannot be remembered, so every start reads every file "
        f"({error.strerror or error}); make the folder yours and writable, or set XDG_CACHE_HOME "
        "to one that is"
    )


@functools.cache
def _warn_once(message: str) -> None:
    """Once in a process."""
    log.warning(message)
