"""What differs between TensorRT and TensorRT-RTX: modules, versions, targets, devices."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from gentron.engines.trt_build import TensorRtCompiler
from gentron.engines.trt_flavor import FLAVORS, RTX_TARGETS
from gentron.errors import BackendError, RequestError

RTX, TENSORRT = FLAVORS["tensorrt-rtx"], FLAVORS["tensorrt"]


def module(name: str, version: str) -> ModuleType:
    made = ModuleType(name)
    made.__version__ = version
    return made


@pytest.fixture
def installed(monkeypatch):
    """Pretends that only these modules are there: `installed(tensorrt="10.12.0.36")`."""

    def install(**versions: str) -> None:
        for name in (*RTX.modules, *TENSORRT.modules):
            monkeypatch.delitem(sys.modules, name, raising=False)
            # None makes an import fail as if it were not installed.
            found = module(name, versions[name]) if name in versions else None
            monkeypatch.setitem(sys.modules, name, found)

    return install


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that cuda.core is there and finds a GPU, or raises."""

    def install(name="NVIDIA GeForce RTX 4090", capability=(8, 9), error=None) -> None:
        def device(index):
            if error is not None:
                raise error
            return SimpleNamespace(name=name, compute_capability=capability)

        core = ModuleType("cuda.core")
        core.Device = device
        core.system = SimpleNamespace(get_kernel_mode_driver_version=lambda: (580, 65, 6))
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.core", core)

    return install


def test_bindings_that_were_installed_alone_are_found(installed):
    installed(tensorrt_bindings="10.12.0.36", tensorrt_rtx_bindings="1.7.1.116")
    assert TENSORRT.load().__name__ == "tensorrt_bindings"
    assert RTX.load().__name__ == "tensorrt_rtx_bindings"


def test_the_package_goes_before_its_bindings(installed):
    installed(tensorrt="11.4.0.106", tensorrt_bindings="11.4.0.106")
    assert TENSORRT.load().__name__ == "tensorrt"


@pytest.mark.parametrize(("flavor", "extra"), [(RTX, "rtx"), (TENSORRT, "tensorrt")])
def test_a_missing_module_says_what_to_install(installed, flavor, extra):
    installed()
    with pytest.raises(BackendError, match=rf"pip install 'gentron\[{extra}\]'"):
        flavor.load()


def test_a_module_whose_libraries_are_missing_is_not_called_missing(monkeypatch, tmp_path):
    text = "raise ImportError('libnvinfer.so.10: cannot open\\nshared object file')"
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match=r"cannot be loaded \(libnvinfer.so.10: cannot open sha"):
        TENSORRT.load()


@pytest.mark.parametrize(
    ("flavor", "version", "accepted"),
    [
        (TENSORRT, "10.11.9", False),
        (TENSORRT, "10.12.0.36", True),
        (TENSORRT, "11.4.0.106", True),
        (TENSORRT, "12.0.0", False),
        (RTX, "1.0.0.21", False),
        (RTX, "1.7.1.116", True),
        (RTX, "2.0", False),
        (RTX, "unknown", False),
    ],
)
def test_versions_outside_the_tested_range_are_refused(installed, flavor, version, accepted):
    installed(**{flavor.modules[0]: version})
    if accepted:
        assert flavor.load().__version__ == version
    else:
        with pytest.raises(BackendError, match=f"found {version}; run: pip install"):
            flavor.load()


def test_strong_typing_is_asked_for_wherever_it_is_not_the_only_one():
    flags = SimpleNamespace(STRONGLY_TYPED=1)
    for version, flavor, expected in (("10.12.0", TENSORRT, 2), ("11.0.0", TENSORRT, 0),
                                      ("1.7.1", RTX, 2)):  # fmt: skip
        trt = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=flags)
        assert flavor.network_flags(trt) == expected


def test_targets_come_in_one_order_and_once():
    assert RTX.targets(["sm120", "sm89", "sm120"]) == ("sm89", "sm120")
    assert RTX.targets([]) == ()


@pytest.mark.parametrize("name", ["sm90", "sm100"])
def test_data_centre_gpus_are_sent_to_the_other_backend(name):
    with pytest.raises(RequestError, match="use --backend tensorrt on that machine"):
        RTX.targets([name])


def test_an_unknown_target_is_answered_with_those_there_are():
    with pytest.raises(RequestError, match=f"'sm42'; one of {', '.join(RTX_TARGETS)}"):
        RTX.targets(["sm42"])


def test_tensorrt_takes_no_target_because_it_tunes_on_the_gpu_it_runs_on():
    with pytest.raises(RequestError, match=r"compiles for the GPU that it runs on.*sm89"):
        TENSORRT.targets(["sm89"])


@pytest.mark.parametrize(
    ("targets", "capability", "runs"),
    [
        ((), (7, 5), False),
        ((), (8, 0), True),
        ((), (9, 0), False),
        ((), (12, 1), True),
        (("sm89",), (8, 9), True),
        (("sm89",), (8, 6), False),
        (("sm75", "sm120"), (7, 5), True),
    ],
)
def test_an_engine_runs_on_the_generations_it_was_made_for(targets, capability, runs):
    assert RTX.runs_on(targets, capability) is runs


def test_without_cuda_core_an_engine_is_refused_and_told_what_to_install(installed, monkeypatch):
    installed(tensorrt_rtx="1.7.1.116")
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    refusal = TensorRtCompiler("tensorrt-rtx").refusal({"version": "1.7.1.116"}, ())
    assert "needs cuda.core" in refusal
    assert "pip install 'gentron[rtx]'" in refusal


def test_without_a_gpu_the_error_is_one_line_of_ours(installed, gpu):
    installed(tensorrt="11.4.0.106")
    gpu(error=RuntimeError("libcuda.so.1 not found\n searched: /usr"))
    compiler = TensorRtCompiler("tensorrt")
    assert "no usable NVIDIA GPU" in compiler.refusal({}, ())
    assert "\n" not in compiler.refusal({}, ())


def test_an_engine_for_this_machine_is_not_refused(installed, gpu):
    installed(tensorrt_rtx="1.7.1.116", tensorrt="11.4.0.106")
    gpu()
    assert TensorRtCompiler("tensorrt-rtx").refusal({"version": "1.7.1.116"}, ["sm89"]) == ""
    made = {"name": "NVIDIA GeForce RTX 4090", "generation": "sm89", "driver": 575}
    identity = {"version": "11.4.0.106", "device": made}
    assert TensorRtCompiler("tensorrt").refusal(identity, ()) == ""


def test_an_engine_of_another_version_or_device_is_refused_by_name(installed, gpu):
    installed(tensorrt_rtx="1.7.1.116", tensorrt="11.4.0.106")
    gpu(name="NVIDIA H100", capability=(9, 0))
    rtx, enterprise = TensorRtCompiler("tensorrt-rtx"), TensorRtCompiler("tensorrt")
    assert "TensorRT-RTX 1.6, and this machine has 1.7" in rtx.refusal({"version": "1.6"}, ())
    refusal = rtx.refusal({"version": "1.7.1.116"}, ())
    assert refusal == "made for sm80 and later, and the GPU here is NVIDIA H100 (sm90)"
    made = {"name": "NVIDIA A100", "generation": "sm80", "driver": 580}
    refusal = enterprise.refusal({"version": "11.4.0.106", "device": made}, ())
    assert refusal == "made for NVIDIA A100 (sm80), and the GPU here is NVIDIA H100 (sm90)"


def test_an_unknown_backend_or_level_is_the_callers_mistake():
    with pytest.raises(RequestError, match="one of tensorrt, tensorrt-rtx"):
        TensorRtCompiler("tensorrt_rtx")
    with pytest.raises(RequestError, match="from 0 to 5"):
        TensorRtCompiler("tensorrt-rtx", level=6)
