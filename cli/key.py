"""gentron-key: who may ask `gentron-serve`."""

from __future__ import annotations

from pathlib import Path

import click

import gentron
from gentron.cli.common import run_command, say
from gentron.errors import RequestError

FILE = click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    default=Path("gentron-keys"),
    show_default=True,
    help="What gentron-serve --api-keys is given.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gentron.__version__)
def cli() -> None:
    """Make, list and remove the keys of gentron-serve. A running server takes note in a second."""


@cli.command()
@click.argument("name")
@click.option("--per-minute", type=click.IntRange(1, 10**9), help="POST requests [the server's].")
@FILE
def add(name: str, file: Path, per_minute: int | None) -> None:
    """Make a key for NAME and print it, once: the file holds its hash alone."""
    from gentron.runtime.keys import NAME, Key, Keys, hash_of, new_key

    if not NAME.fullmatch(name):
        raise RequestError("name", "must be 1 to 63 letters, digits and . _ -")
    keys = dict(Keys.read(file).by_name) if file.exists() else {}
    if name in keys:
        raise RequestError("name", f"{name} has a key in {file}; remove it first: gentron-key "
                           f"remove {name} --file {file}")  # fmt: skip
    secret = new_key()
    Keys(keys | {name: Key(name, hash_of(secret), per_minute)}).write(file)
    say(secret)


@cli.command(name="list")
@FILE
def show(file: Path) -> None:
    """Names and limits."""
    from gentron.runtime.keys import Keys

    for key in Keys.read(file).by_name.values():
        say(key.name if key.per_minute is None else f"{key.name}\t{key.per_minute} a minute")


@cli.command()
@click.argument("name")
@FILE
def remove(name: str, file: Path) -> None:
    """Take NAME's key away."""
    from gentron.runtime.keys import Keys

    keys = dict(Keys.read(file).by_name)
    if keys.pop(name, None) is None:
        raise RequestError("name", f"{name!r} has no key in {file}; see: gentron-key list")
    Keys(keys).write(file)


def main() -> None:
    run_command(cli)
