"""gentron-serve: an HTTP server with OpenAI's images and videos interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.clustering import Cluster, cluster_options
from gentron.cli.common import run_command
from gentron.cli.drawing import engine_options
from gentron.cli.job_options import JobChoice, job_options
from gentron.cli.serving import Serving, serving_options
from gentron.errors import BackendError, GenTronError

if TYPE_CHECKING:
    from gentron.runtime.service import Service


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@serving_options
@job_options
@cluster_options
@engine_options
@click.version_option(gentron.__version__)
def cli(choice: Any, jobs: JobChoice, serving: Serving, cluster: Cluster) -> None:
    """Serve a bundle over HTTP."""
    try:
        import uvicorn  # noqa: F401

        from gentron.runtime import server_log
        from gentron.runtime.http_api import create_app
        from gentron.runtime.http_server import Server
        from gentron.runtime.metrics import Metrics
    except ImportError as error:
        raise BackendError(
            f"the server's packages are missing ({error}); run: pip install 'gentron[serve]'"
        ) from error
    from gentron.runtime.admission import Bounds
    from gentron.runtime.residency import check_room_beside
    from gentron.runtime.scheduling import Capacity
    from gentron.runtime.service import Options, Service

    access, metrics = serving.access(), Metrics()
    server_log.configure(serving.log_format)
    bounds = Bounds(requests=serving.max_requests)
    if serving.max_per_client is not None:
        bounds = Bounds(requests=serving.max_requests, per_client=serving.max_per_client)
    store = jobs.open()  # before the bundle: that another server has the folder is told at once
    options = Options(
        bounds=bounds,
        capacity=Capacity(samples=serving.max_samples),
        observer=metrics.of_service(),
    )
    deploy = cluster.opener(choice, serving, options)
    # Before the server starts: what is wrong with it is one line.
    first: list[Any] = [deploy() if deploy else choice.load()]

    def open_service() -> Service:
        if deploy:
            deployed: Service = first.pop() if first else deploy()
            return deployed
        if first:
            pipe = first.pop()
        else:
            check_room_beside(choice.bundle or "emoji", choice.precision)
            pipe = choice.load()
        return Service(pipe, options, owns=True)

    app = create_app(
        open_service, metrics, serving.warm_up, store, access, log_prompts=serving.log_prompts
    )
    server = Server(app, serving.host, serving.port, serving.drain_timeout)
    try:
        server.run()
    finally:
        for left in first:  # it never started
            left.scheduler.close() if deploy else left.close()
    if not server.started:
        raise GenTronError(
            f"the server did not start on {serving.host}:{serving.port}; the line above says why"
        )


def main() -> None:
    run_command(cli)
