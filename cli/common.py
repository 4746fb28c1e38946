"""How every command ends: one clear line and an exit code, never a traceback for a typo."""

from __future__ import annotations

import _thread
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from typing import Any, ClassVar, NoReturn

import click

from gentron.errors import GenTronError, OutputError

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
AGAIN = 0.05  # seconds until a lost Ctrl-C is sent once more


def run_command(command: click.Command) -> NoReturn:
    """Runs a click command: 0 on success, 2 for the caller's mistakes, 130 for Ctrl-C."""
    told = sys.unraisablehook
    sys.unraisablehook = partial(_send_again, told)
    try:
        command.main(standalone_mode=False)
    except click.Abort:
        warn("interrupted; nothing unfinished was kept")
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_ERROR)
    except GenTronError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_ERROR)
    finally:
        sys.unraisablehook = told
    sys.exit(0)


def _send_again(told: Callable[[Any], object], lost: Any) -> None:
    """Python drops what is raised in a callback of its own, such as those that run while modules
    are imported, and a Ctrl-C that arrives there with it."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(AGAIN, _thread.interrupt_main).start()
    else:
        told(lost)


def say(line: str) -> None:
    """A line on standard output, in letters that it has; raises OutputError if it is full."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(line.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output: cannot be written: {error.strerror}") from error


def warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """`8GB`, `500MB`, `12 GiB` -> bytes."""

    name = "BYTES"
    UNITS: ClassVar = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                       "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?I?B?)", str(value).strip().upper())
        unit = found[2] if found else "?"
        if found is None or unit not in self.UNITS or not float(found[1]):
            self.fail(f"{value!r} is not an amount of memory, such as 8GB or 500MB", param, ctx)
        return int(float(found[1]) * self.UNITS[unit])


class DeviceNumbers(click.ParamType):  # type: ignore[type-arg]
    """`0,1` -> (0, 1)."""

    name = "DEVICES"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not numbers of GPUs, such as 0,1", param, ctx)
        return tuple(int(part) for part in parts)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """`128x96` -> (width, height)."""

    name = "WxH"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        width, cross, height = str(value).lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not WIDTHxHEIGHT in pixels, such as 128x128", param, ctx)
        return int(width), int(height)


class Levels(click.ParamType):  # type: ignore[type-arg]
    """`0.3,5` -> (0.3, 5.0), two noise levels."""

    name = "LO,HI"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, float]:
        from gentron.guidance import check_interval

        try:
            low, high = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not LO,HI, two noise levels such as 0.3,5", param, ctx)
        return check_interval((low, high))


def gathered(
    command: Callable[..., None], name: str, kind: Any, options: Sequence[Any]
) -> Callable[..., None]:
    """`command` with click's `options`, which it gets as one `name`: the dataclass `kind`, whose
    fields they are."""

    @wraps(command)
    def gather(**given: Any) -> None:
        chosen = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**{name: chosen}, **given)

    for option in reversed(options):
        gather = option(gather)
    return gather
