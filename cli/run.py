"""gentron-run: pictures and videos from a bundle, and what a bundle and this machine can do."""

from __future__ import annotations

import json
from typing import Any

import click

import gentron
from gentron.cli.common import run_command
from gentron.cli.image import image
from gentron.cli.video import video


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gentron.__version__)
def cli() -> None:
    """Run a GenTron bundle: text to image and to video, on compiled engines."""


cli.add_command(image)
cli.add_command(video)


@cli.command()
@click.argument("bundle", default="emoji")
@click.option("--verify", is_flag=True, help="Read every file, also those checked before.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def info(bundle: str, verify: bool, as_json: bool) -> None:
    """What BUNDLE holds: components, precisions, sizes, weights, licences.

    Checks the size and sha256 of every file. One that was checked before and whose dates are
    still the same is not read again.
    """
    from gentron.bundle import Bundle
    from gentron.runtime.describe import bundle_facts

    facts = bundle_facts(Bundle.open(bundle, verify="all" if verify else "remembered"))
    facts["checked"] = "every file, " + ("read anew" if verify else "read where it had changed")
    click.echo(json.dumps(facts, indent=1) if as_json else _lines(facts))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Versions, devices, and which backends could run here."""
    from gentron.runtime.describe import machine_facts

    facts = machine_facts()
    click.echo(json.dumps(facts, indent=1) if as_json else _lines(facts))


def _lines(facts: dict[str, Any], indent: str = "") -> str:
    """Nested facts as aligned text."""
    width = max(len(name) for name in facts) if facts else 0
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {value}")
    return "\n".join(lines)


def main() -> None:
    run_command(cli)
