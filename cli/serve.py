"""gentron-serve: an HTTP server with OpenAI's images and videos interface."""

from __future__ import annotations

from typing import Any

import click

import gentron
from gentron.cli.common import Size, run_command
from gentron.cli.drawing import engine_options
from gentron.errors import BackendError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any free one.",
)
@click.option(
    "--warm-up",
    "warm_up",
    type=Size(),
    multiple=True,
    help="Pixels, such as 128x128, to be ready for; may be repeated [the model's own].",
)
@click.option(
    "--max-samples",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Of one size under way at once.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Waiting and under way; more are told to come again.",
)
@engine_options
@click.version_option(gentron.__version__)
def cli(choice: Any, host: str, port: int, warm_up: tuple[tuple[int, int], ...],
        max_samples: int, max_requests: int) -> None:  # fmt: skip
    """Serve a bundle over HTTP."""
    try:
        import uvicorn

        from gentron.runtime.http_api import create_app
        from gentron.runtime.metrics import Metrics
    except ImportError as error:
        raise BackendError(
            f"the server's packages are missing ({error}); run: pip install 'gentron[serve]'"
        ) from error
    from gentron.runtime.admission import Bounds
    from gentron.runtime.scheduling import Capacity
    from gentron.runtime.service import Options, Service

    with choice.load() as pipe:
        metrics = Metrics()
        options = Options(
            bounds=Bounds(requests=max_requests),
            capacity=Capacity(samples=max_samples),
            observer=metrics,
        )
        app = create_app(lambda: Service(pipe, options), metrics, warm_up)
        uvicorn.run(app, host=host, port=port, log_level="info")


def main() -> None:
    run_command(cli)
