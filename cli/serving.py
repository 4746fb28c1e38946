"""What `gentron-serve` can be told: what it takes on, whom it lets in, how it logs and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gentron.cli.common import Size, gathered
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.runtime.http_access import Access

Command = Callable[..., None]
FILE = click.Path(path_type=Path)

WORK = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
                 help="0: any free one."),
    click.option("--warm-up", "warm_up", type=Size(), multiple=True,
                 help="Pixels, such as 128x128, to be ready for; may be repeated "
                      "[the model's own]."),
    click.option("--max-samples", type=click.IntRange(1, 64), default=32, show_default=True,
                 help="Of one size under way at once."),
    click.option("--max-requests", type=click.IntRange(1), default=64, show_default=True,
                 help="Waiting and under way; more are told to come again."),
    click.option("--max-per-client", type=click.IntRange(1),
                 help="Of those, from one key (or address) [no limit of its own]."),
)  # fmt: skip
ACCESS = (
    click.option("--api-keys", "api_keys", type=FILE, metavar="FILE",
                 help="Only those who have a key may ask; make them with gentron-key."),
    click.option("--no-auth", is_flag=True,
                 help="Everybody may ask, though --host is not the loopback."),
    click.option("--per-minute", type=click.IntRange(1),
                 help="POST requests of one key (or address) [no limit]."),
    click.option("--allow-host", "allow_host", multiple=True, metavar="NAME",
                 help="Name that the server is asked by; may be repeated."),
    click.option("--open-metrics", is_flag=True, help="/metrics without a key."),
)  # fmt: skip
OPERATION = (
    click.option("--drain-timeout", type=click.FloatRange(0, 86400), default=30.0,
                 show_default=True, help="Seconds that requests have to end after SIGTERM."),
    click.option("--log-format", type=click.Choice(["console", "json"]), default="console",
                 show_default=True, help="Lines for a person, or JSON."),
    click.option("--log-prompts", is_flag=True, help="Prompts too; they are not logged otherwise."),
)  # fmt: skip


@dataclass(frozen=True)
class Serving:
    host: str
    port: int
    warm_up: tuple[tuple[int, int], ...]
    max_samples: int
    max_requests: int
    max_per_client: int | None
    api_keys: Path | None
    no_auth: bool
    per_minute: int | None
    allow_host: tuple[str, ...]
    open_metrics: bool
    drain_timeout: float
    log_format: Any
    log_prompts: bool

    def access(self) -> Access:
        """Raises RequestError for what would let in more than was meant."""
        from gentron.runtime.http_access import Access, is_loopback

        if self.api_keys is not None and self.no_auth:
            raise RequestError("no-auth", "contradicts --api-keys; leave one of them out")
        if self.api_keys is None and not self.no_auth and not is_loopback(self.host):
            raise RequestError(
                "host",
                f"{self.host} can be reached from other machines, and anybody could use this one: "
                "give --api-keys FILE (see gentron-key), or --no-auth if something in front of it "
                "asks who they are",
            )
        names = frozenset(name.lower() for name in self.allow_host)
        # With keys, a page that points its name here still has none.
        hosts = None if self.api_keys is not None and not names else names
        return Access(self.api_keys, hosts, self.per_minute, self.open_metrics)


def serving_options(command: Command) -> Command:
    """All of them, as one `Serving`."""
    return gathered(command, "serving", Serving, (*WORK, *ACCESS, *OPERATION))
