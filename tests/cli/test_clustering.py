"""`gentron-serve --ray`: what is refused before any cluster is joined, and without Ray."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from gentron.cli.clustering import Cluster
from gentron.errors import BackendError, RequestError


class Choice:
    devices: Any = None
    bundle = None


@pytest.mark.parametrize("replicas", ["0", "4:1", "", "1:", "-1", "many", "1:2:3"])
def test_replicas_that_cannot_be_are_refused(replicas: str) -> None:
    with pytest.raises(RequestError, match=r"replicas: must be a number, or LEAST:MOST"):
        Cluster("local", replicas, 1.0, 0.0).opener(Choice(), None, None)


def test_devices_are_for_ray_to_choose() -> None:
    choice = Choice()
    choice.devices = (0,)
    with pytest.raises(RequestError, match="use --replica-gpus"):
        Cluster("local", "1", 1.0, 0.0).opener(choice, None, None)


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gentron.runtime.ray_serve", raising=False)
    monkeypatch.delattr("gentron.runtime.ray_serve", raising=False)
    with pytest.raises(BackendError, match=r"pip install 'gentron\[ray\]'"):
        Cluster("local", "1:2", 1.0, 0.0).opener(Choice(), None, None)


def test_without_the_option_this_process_computes() -> None:
    assert Cluster(None, "1", 1.0, 0.0).opener(Choice(), None, None) is None
