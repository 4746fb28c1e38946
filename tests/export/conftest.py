"""Tiny PixArt pipelines as diffusers writes them, and GenTron's network with their weights."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from gentron.export.source import Origin, from_checkpoint
from gentron.model import GenTron

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pixart_example.py"


class Imported(NamedTuple):
    """One checkpoint, as diffusers opens it and as we do."""

    folder: Path
    pipe: Any  # diffusers' pipeline, float32
    origin: Origin


@pytest.fixture(scope="session")
def pixart_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pixart_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pixart(
    pixart_script: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Imported]:
    """`pixart("alpha-1024")`; do not write into its folder."""
    made: dict[str, Imported] = {}

    def get(kind: str) -> Imported:
        if kind not in made:
            folder = tmp_path_factory.mktemp("pixart") / kind
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe = pixart_script.write_pixart(folder, kind)
            pipe.set_progress_bar_config(disable=True)
            made[kind] = Imported(folder, pipe, from_checkpoint(folder))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def pixart_network() -> Callable[[Origin], GenTron]:
    """GenTron's network with the imported tensors, in float64."""

    def make(origin: Origin) -> GenTron:
        model = GenTron(origin.source.config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(origin.read("transformer", name, tuple(parameter.shape)))
        return model

    return make
