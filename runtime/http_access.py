"""Who may ask, from where, and how often: decided from a request's method, path and headers."""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gentron.errors import RequestError
from gentron.runtime.keys import Keys
from gentron.runtime.rates import Rates

log = logging.getLogger(__name__)
# Answer without a key: what load balancers and monitors of life ask, and the page, which asks for
# the key itself. Nothing under them tells of anybody's work.
OPEN = frozenset({"/", "/healthz", "/readyz", "/favicon.ico", "/openapi.json"})
OPEN_BELOW = ("/static/",)
READING = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_KEY = 512  # characters of an Authorization header that are looked at
LOOK_AGAIN = 1.0  # seconds after which the key file's date is looked at again


@dataclass(frozen=True)
class Refusal:
    status: int
    code: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Access:
    """Without a key file everybody may ask, and is told apart by address.

    `hosts` are names that the server answers to besides localhost and addresses in numbers; None:
    to any. `per_minute` bounds a client's POST requests, unless its key has a limit of its own.
    """

    key_file: Path | None = None
    hosts: Collection[str] | None = frozenset()
    per_minute: int | None = None
    open_metrics: bool = False

    def __post_init__(self) -> None:
        """Raises RequestError for a key file that cannot be used."""
        self.keys: Keys | None = None
        self._rates = Rates()
        self._looked, self._date = time.monotonic(), 0
        if self.key_file is not None:
            self._date = _date(self.key_file)
            self.keys = Keys.read(self.key_file)

    def _keys(self) -> Keys | None:
        """Read again a second after the file was changed; while it is wrong, those before stay."""
        now = time.monotonic()
        if self.key_file is not None and now - self._looked > LOOK_AGAIN:
            self._looked, before = now, self._date
            self._date = _date(self.key_file)
            if self._date != before:
                try:
                    self.keys = Keys.read(self.key_file)
                    log.info("%d keys are known now", len(self.keys.by_name))
                except RequestError as error:
                    log.error("the keys stay as they were: %s", error)
        return self.keys

    def judge(
        self, method: str, path: str, headers: Callable[[str], str | None], address: str
    ) -> tuple[str, Refusal | None]:
        """The client's name, and why not. `headers` gives the first of a name, lower-case."""
        if refusal := self._elsewhere(headers):
            return "", refusal
        client, per_minute = address, self.per_minute
        keys = self._keys()
        if keys is not None and not self._open(method, path):
            scheme, _, presented = (headers("authorization") or "").partition(" ")
            if scheme.lower() != "bearer" or not presented.strip():
                return "", _unauthorized("no key: send it as Authorization: Bearer KEY")
            key = keys.find(presented.strip()) if len(presented) <= MAX_KEY else None
            if key is None:
                return "", _unauthorized("this key is not known here", 'error="invalid_token"')
            client, per_minute = key.name, key.per_minute or self.per_minute
        if method not in READING and per_minute is not None:
            wait = self._rates.take(client, per_minute)
            if wait > 0:
                seconds = max(1, math.ceil(wait))
                return client, Refusal(
                    429, "rate_limit", f"more than {per_minute} requests a minute; try again in "
                    f"{seconds} s", {"Retry-After": str(seconds)},
                )  # fmt: skip
        return client, None

    def _open(self, method: str, path: str) -> bool:
        if method not in READING:
            return False
        if path == "/metrics":
            return self.open_metrics
        return path in OPEN or path.startswith(OPEN_BELOW)

    def _elsewhere(self, headers: Callable[[str], str | None]) -> Refusal | None:
        """Pages of other sites in a browser on this machine or in this network.

        Such a page reaches the server under a name of its own that it pointed here (so the Host is
        asked; nobody can point an address in numbers elsewhere), or sends a form or fetch across
        sites (so the Origin is). Programs send no Origin.
        """
        host = headers("host") or ""
        if self.hosts is not None and not (_is_number(_name(host)) or _name(host) in self.hosts):
            return Refusal(
                421, "host", f"Host: {host[:80]!r} is not this server's name; ask for its address "
                "in numbers, or start it with --allow-host NAME",
            )  # fmt: skip
        origin = headers("origin")
        if origin is None:
            return None
        theirs = urlsplit(origin).netloc if "\\" not in origin else ""
        if theirs and (theirs.lower() == host.lower() or _name(theirs) in set(self.hosts or ())):
            return None
        return Refusal(
            403, "origin", f"Origin: pages of {origin[:80]!r} may not ask here; only this server's "
            "own page may, and programs, which send no Origin",
        )  # fmt: skip


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def _date(file: Path) -> int:
    """0 while there is no such file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _name(host: str) -> str:
    """Without its port; "" for what is no host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _unauthorized(message: str, more: str = "") -> Refusal:
    challenge = 'Bearer realm="gentron"' + (f", {more}" if more else "")
    return Refusal(401, "invalid_api_key", message, {"WWW-Authenticate": challenge})
