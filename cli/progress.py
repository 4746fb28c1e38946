"""Progress of several components: bars on a terminal, elsewhere a line for each activity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[str, str, float], None]  # (component, what is being done, share done)
Say = Callable[[str], None]


@contextmanager
def component_bars() -> Iterator[tuple[Progress, Say]]:
    """A bar for each component, and a way to say something above them; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[component]:<20}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        last: dict[str, str] = {}

        def progress(component: str, doing: str, share: float) -> None:
            if component not in tasks:
                tasks[component] = bars.add_task(doing, total=1.0, component=component)
            bars.update(tasks[component], description=doing, completed=share)
            if not console.is_terminal and last.get(component) != doing:
                click.echo(f"{component}: {doing}", err=True)
            last[component] = doing

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        yield progress, say
