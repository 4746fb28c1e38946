"""Several GPUs: a pipeline and an owner thread each, and prompts go to whichever is free."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gentron.bundle import Bundle
from gentron.cli.run import cli
from gentron.engines import EngineOptions, backend_named
from gentron.engines.registry import BACKENDS
from gentron.errors import BackendError, RequestError
from gentron.runtime import Pipeline
from gentron.runtime.devices import Devices, stopped

REQUEST = {"seed": 7, "steps": 3, "solver": "ddim", "guidance": 4.0}
PROMPTS = ["a cat", "a dog", "a bird", "a car"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def gpus(simulated):
    """Two, each of which knows the threads that held it."""

    class Owned(simulated.SimulatedGpu):
        def __init__(self):
            super().__init__()
            self.threads: set[str] = set()

        @contextmanager
        def held(self):
            with super().held():
                self.threads.add(threading.current_thread().name)
                yield

    made = [Owned(), Owned()]
    yield made
    for gpu in made:
        assert gpu.faults == gpu.leaks() == []
        assert gpu.closed


@pytest.fixture
def backend_of(simulated, gpus, tmp_path):
    from gentron.engines.cache import EngineCache
    from gentron.engines.trt_run import TensorRtBackend

    store = EngineCache(tmp_path / "engines")

    def make(options: EngineOptions):
        gpu = gpus[options.device or 0]
        return TensorRtBackend(
            "tensorrt",
            EngineOptions(store=store, device=options.device),
            device=lambda: gpu,
            trt=simulated.SimulatedTensorRt(gpu, simulated.require),
            compiler=simulated.SimulatedCompiler(),
        )

    return make


@pytest.fixture
def load(bundle, backend_of):
    return lambda device: Pipeline(bundle, backend_of(EngineOptions(device=device)), "fp32", "fp32")


def test_each_device_is_touched_by_its_owner_alone_and_draws_the_same(bundle, gpus, load):
    with Pipeline(bundle, backend_named("onnxruntime"), "fp32", "fp32") as pipeline:
        wanted = [pipeline(prompt, **REQUEST).latents for prompt in PROMPTS]
    both = threading.Barrier(2, timeout=60)  # each draws one of the first two

    def draw(prompt, pipeline):
        if prompt in PROMPTS[:2]:
            both.wait()
        return pipeline(prompt, **REQUEST).latents, threading.current_thread().name

    with Devices(load, [0, 1]) as devices:
        drawn = [devices.submit(lambda pipe, p=prompt: draw(p, pipe)) for prompt in PROMPTS]
        found = [future.result() for future in drawn]
    for (latents, _), expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(latents, expected)
    assert {name for _, name in found} == {"gpu-0", "gpu-1"}
    assert [gpu.threads for gpu in gpus] == [{"gpu-0"}, {"gpu-1"}]


def test_an_error_of_one_request_is_its_own(load, gpus):
    with Devices(load, [0, 1]) as devices:
        wrong = devices.submit(lambda pipe: pipe("a cat", **REQUEST | {"steps": 0}))
        right = devices.submit(lambda pipe: pipe("a cat", **REQUEST))
        with pytest.raises(RequestError, match="steps"):
            wrong.result()
        assert right.result().images.any()


def test_a_device_that_cannot_be_loaded_frees_the_others(load, gpus):
    def load_first(device):
        if device == 1:
            time.sleep(0.2)
            raise BackendError("tensorrt: no GPU number 1")
        return load(device)

    with pytest.raises(BackendError, match="no GPU number 1"):
        Devices(load_first, [0, 1])
    gpus[1].close()


def test_closing_cancels_what_waits_and_stops_what_runs(load, gpus):
    started = threading.Event()
    gpus[1].close()

    def run(pipeline):
        for _ in pipeline.stream("a cat", **REQUEST | {"steps": 200}):
            started.set()
            if devices.stopping.is_set():
                raise stopped()

    devices = Devices(load, [0])
    running, waiting = devices.submit(run), devices.submit(run)
    assert started.wait(60)
    devices.close()
    devices.close()
    assert waiting.cancelled()
    with pytest.raises(type(stopped())):
        running.result()
    with pytest.raises(BackendError, match="closed"):
        devices.submit(run)


@pytest.mark.parametrize("numbers", [[], [0, 0]])
def test_devices_differ(numbers, load, gpus):
    with pytest.raises(RequestError, match="devices: must differ"):
        Devices(load, numbers)
    for gpu in gpus:
        gpu.close()


def test_prompts_are_shared_on_the_command_line(
    bundle, gpus, backend_of, tmp_path, monkeypatch, tiny_bundle
):
    monkeypatch.setitem(BACKENDS, "tensorrt", backend_of)
    (tmp_path / "out").mkdir()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [
        "image", "--prompts", str(tmp_path / "prompts.txt"), "-m", str(tiny_bundle), "--seed", "7",
        "--steps", "3", "--backend", "tensorrt", "--devices", "0,1", "--json",
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert all(Path(line["file"]).is_file() for line in lines)
    assert [gpu.threads for gpu in gpus] == [{"gpu-0"}, {"gpu-1"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--devices", "x"], "is not numbers of GPUs, such as 0,1"),
        (["a cat", "--devices", "0,1", "--backend", "tensorrt", "--like", "x.png"], "exactly one"),
        (["a cat", "--devices", "0", "--backend", "onnxruntime"], "computes on the CPU"),
        (["a cat", "--devices", "0,0", "--backend", "tensorrt"], "devices: must differ"),
    ],
)
def test_what_devices_cannot_be_is_one_line(arguments, words, tiny_bundle):
    import click

    from gentron.errors import GenTronError

    with pytest.raises((GenTronError, click.ClickException)) as caught:
        cli.main(["image", "-m", str(tiny_bundle), *arguments], standalone_mode=False)
    assert words in str(getattr(caught.value, "message", caught.value))
