"""API keys: a file of names and hashes, read when the server starts and again on request.

A key is 256 random bits, so nobody can find it by trying, and one round of SHA-256 hides it as
well as a slow password hash would: those exist because people's passwords can be guessed. What the
file holds is of no use to whoever reads it; who can write it can let anyone in, so its permissions
are checked.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gentron.errors import OutputError, RequestError

PREFIX = "gentron-"  # lets scanners of repositories recognise a key
KEY = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
LINE = re.compile(r"(\S+)\s+sha256:([0-9a-f]{64})(?:\s+per-minute=([0-9]{1,9}))?")
FORBIDDEN = stat.S_IWGRP | stat.S_IRWXO  # the owner's group may read it
MOST = 10_000  # keys of a file
HEAD = "# Keys of gentron-serve: NAME sha256:HASH [per-minute=N]. Made by gentron-key.\n"


@dataclass(frozen=True)
class Key:
    name: str  # whose work it is: jobs, shares and limits go by it
    hash: str  # SHA-256 of the key, in hex
    per_minute: int | None = None  # requests; None is the server's own limit


@dataclass(frozen=True)
class Keys:
    """Those of a file."""

    by_name: Mapping[str, Key]

    @classmethod
    def read(cls, file: Path) -> Keys:
        """Raises RequestError that names the file and line, or what is wrong with its owner or
        permissions."""
        try:
            with file.open(encoding="utf-8") as stream:
                _check_permissions(file, os.fstat(stream.fileno()))
                text = stream.read(1 << 22)
        except (OSError, ValueError) as error:
            raise RequestError("api-keys", f"{file}: cannot be read: {error}") from error
        found: dict[str, Key] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = LINE.fullmatch(line.strip())
            if parts is None or not NAME.fullmatch(parts[1]):
                raise RequestError(
                    "api-keys",
                    f"{file}, line {number}: must be NAME sha256:HASH [per-minute=N]; "
                    "make keys with: gentron-key add",
                )
            if parts[1] in found:
                raise RequestError("api-keys", f"{file}, line {number}: {parts[1]} is there twice")
            found[parts[1]] = Key(parts[1], parts[2], int(parts[3]) if parts[3] else None)
            if len(found) > MOST:
                raise RequestError("api-keys", f"{file}: more than {MOST} keys")
        return cls(found)

    def find(self, presented: str) -> Key | None:
        """Takes as long for a key that is close as for one that is not: hashes are compared, all of
        them, and each in constant time."""
        digest = hash_of(presented)
        found = None
        for key in self.by_name.values():
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found

    def write(self, file: Path) -> None:
        """Whole or not at all, readable by its owner and nobody else; raises OutputError."""
        lines = [
            f"{key.name} sha256:{key.hash}"
            + (f" per-minute={key.per_minute}" if key.per_minute else "")
            for key in self.by_name.values()
        ]
        try:
            descriptor, name = tempfile.mkstemp(prefix=".keys-", dir=file.parent)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    stream.write(HEAD + "".join(f"{line}\n" for line in lines))
                    stream.flush()
                    os.fsync(stream.fileno())
                if file.exists():  # keeps what its owner allows a group
                    Path(name).chmod(stat.S_IMODE(file.stat().st_mode) & ~FORBIDDEN)
                Path(name).replace(file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OutputError(f"{file}: cannot be written: {error}") from error


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _check_permissions(file: Path, found: os.stat_result) -> None:
    if os.name != "posix":
        return
    if stat.S_IMODE(found.st_mode) & FORBIDDEN:
        raise RequestError(
            "api-keys",
            f"{file}: others may read or change it ({stat.filemode(found.st_mode)}); "
            f"run: chmod 600 {file}",
        )
    if found.st_uid not in (0, os.geteuid()):
        raise RequestError(
            "api-keys", f"{file}: belongs to another user; it must be root's or the server's own"
        )
