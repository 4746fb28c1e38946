"""`gentron-serve --ray`: the replicas that compute, on how many machines."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gentron.cli.common import gathered
from gentron.errors import BackendError, RequestError

if TYPE_CHECKING:
    from gentron.cli.serving import Serving
    from gentron.runtime.service import Options, Service

Command = Callable[..., None]

OPTIONS = (
    click.option("--ray", metavar="ADDRESS",
                 help="Replicas in this Ray cluster compute; auto: the one that this machine is "
                      "in; local: one is started here."),
    click.option("--replicas", default="1", metavar="LEAST[:MOST]", show_default=True,
                 help="As many as the queue needs; for --ray."),
    click.option("--replica-cpus", type=click.FloatRange(0), default=1.0, show_default=True,
                 help="That Ray sets aside for each."),
    click.option("--replica-gpus", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="The same of GPUs."),
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    ray: str | None
    replicas: str
    replica_cpus: float
    replica_gpus: float

    def opener(
        self, choice: Any, serving: Serving, options: Options
    ) -> Callable[[], Service] | None:
        """Joins the cluster; what it returns deploys replicas of the chosen bundle. None without
        `--ray`. Raises RequestError, BackendError."""
        if self.ray is None:
            return None
        least, most = self._counts()
        if choice.devices:
            raise RequestError("devices", "are for Ray to choose; use --replica-gpus")
        try:
            from gentron.runtime import ray_serve
        except ImportError as error:
            raise BackendError(
                f"Ray's packages are missing ({error}); run: pip install 'gentron[ray]'"
            ) from error
        from gentron.bundle import Bundle

        ray_serve.connect(None if self.ray == "local" else self.ray)
        if choice.bundle is not None and Path(choice.bundle).is_dir():
            choice = replace(choice, bundle=str(Path(choice.bundle).resolve()))
        replicas = ray_serve.Replicas(
            least, most, serving.max_samples, self.replica_cpus, self.replica_gpus
        )
        return lambda: ray_serve.open_front(
            Bundle.open(choice.bundle or "emoji"), choice.load, replicas, options, serving.warm_up
        )

    def _counts(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", self.replicas)
        least = int(found[1]) if found else 0
        most = int(found[2] or found[1]) if found else 0
        if not 1 <= least <= most:
            raise RequestError(
                "replicas", f"must be a number, or LEAST:MOST such as 1:4, got {self.replicas!r}"
            )
        return least, most


def cluster_options(command: Command) -> Command:
    """All of them, as one `Cluster`."""
    return gathered(command, "cluster", Cluster, OPTIONS)
