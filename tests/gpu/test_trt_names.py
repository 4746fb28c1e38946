"""What runs an engine calls TensorRT by names that it has; and so does what stands for it here."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from gentron.engines.device_cuda import driver_missing

ROOT = Path(__file__).resolve().parents[2]
TABLES = json.loads((ROOT / "tests" / "engines" / "trt_api.json").read_text("utf-8"))
SOURCES = [ROOT / "engines" / f"trt_{part}.py" for part in ("plan", "profiles", "kernels", "run")]
# Everything that is called while an engine is loaded and run, with its number of arguments.
USED = {
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "create_execution_context": 1,
        "create_runtime_config": 0,
        "get_tensor_dtype": 1,
        "get_tensor_mode": 1,
        "get_tensor_name": 1,
        "get_tensor_profile_shape": 2,
        "num_io_tensors": None,
        "num_optimization_profiles": None,
    },
    "IExecutionContext": {
        "execute_async_v3": 1,
        "get_tensor_shape": 1,
        "infer_shapes": 0,
        "set_device_memory": 2,
        "set_input_shape": 2,
        "set_optimization_profile_async": 2,
        "set_tensor_address": 2,
        "update_device_memory_size_for_shapes": 0,
    },
    "IRuntimeConfig": {"set_execution_context_allocation_strategy": 1},
    "Refitter": {"refit_cuda_engine": 0},
    "OnnxParserRefitter": {"refit_from_file": 1},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": None},
    "TensorIOMode": {"INPUT": None, "OUTPUT": None},
}
RTX_ONLY = {
    "Runtime": {"get_engine_validity": 1},
    "IRuntimeConfig": {
        "create_runtime_cache": 0,
        "cuda_graph_strategy": None,
        "dynamic_shapes_kernel_specialization_strategy": None,
        "set_runtime_cache": 1,
    },
    "IRuntimeCache": {"deserialize": 1, "serialize": 0},
    "CudaGraphStrategy": {"WHOLE_GRAPH_CAPTURE": None, "DISABLED": None},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": None},
    "EngineInvalidityDiagnostics": {},
}
STAND_INS = {
    "Runtime": "Runtime",
    "ICudaEngine": "Engine",
    "IExecutionContext": "Context",
    "IRuntimeConfig": "RuntimeConfig",
    "IRuntimeCache": "RuntimeCache",
    "Refitter": "Refitter",
    "OnnxParserRefitter": "OnnxParserRefitter",
}
OURS = {"engine"}  # of a stand-in, where TensorRT has an attribute of the same name and meaning


def members(*tables):
    return {
        (kind, name): count
        for table in tables
        for kind, names in table.items()
        for name, count in names.items()
    }


@pytest.mark.parametrize("version", TABLES)
def test_tensorrt_has_every_name_with_as_many_arguments(version):
    wrong = []
    for (kind, name), count in members(USED).items():
        table = TABLES[version].get(kind, {})
        fits = name in table and (count is None or any(
            sum(not n.endswith("=") for n in names) <= count <= len(names)
            for names in table[name] or []
        ))  # fmt: skip
        if not fits:
            wrong.append(f"{kind}.{name} {table.get(name)}")
    assert not wrong


def test_tensorrt_rtx_has_every_name():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    lacking = [(kind, name) for kind, name in members(USED, RTX_ONLY)
               if not hasattr(getattr(trt, kind), name)]  # fmt: skip
    assert not lacking


@pytest.mark.parametrize("kind", STAND_INS)
def test_the_stand_in_has_what_is_used_and_invents_nothing(kind, simulated):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    stand_in = getattr(simulated, STAND_INS[kind])
    methods = {name for name, _ in inspect.getmembers(stand_in, inspect.isfunction)
               if not name.startswith("_")}  # fmt: skip
    assert {name for name in methods if not hasattr(getattr(trt, kind), name)} == set()
    wanted = {
        name for (of, name), count in members(USED).items() if of == kind and count is not None
    }
    assert wanted <= methods


def test_the_list_above_is_what_the_source_calls():
    """Every method or attribute of TensorRT's classes that the source names is in the list."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    text = "\n".join(file.read_text() for file in SOURCES)
    called = set(re.findall(r"\.([a-z][a-z0-9_]{5,})\b", text))
    known = {name for _, name in members(USED, RTX_ONLY)}
    kinds = ("ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "Runtime",
             "Refitter", "OnnxParserRefitter")  # fmt: skip
    theirs = {name for kind in kinds for name in dir(getattr(trt, kind)) if name[0] != "_"}
    assert (called & theirs) - known - {"profiler"} == set()


@pytest.mark.skipif(not driver_missing(), reason="this machine has a driver")
def test_the_real_tensorrt_rtx_refuses_without_a_gpu_in_one_line(
    tiny_bundle, simulated, tmp_path, cache_home
):
    """Memory is simulated, module, builder and plan are real: the code around them is run."""
    pytest.importorskip("tensorrt_rtx_bindings")
    from gentron.bundle import Bundle
    from gentron.engines import EngineOptions, bundle_graph
    from gentron.engines.cache import EngineCache
    from gentron.engines.trt_run import TensorRtBackend
    from gentron.errors import BackendError

    gpu = simulated.SimulatedGpu()
    options = EngineOptions(store=EngineCache(tmp_path))
    bundle = Bundle.open(tiny_bundle)
    with (
        TensorRtBackend("tensorrt-rtx", options, device=lambda: gpu) as backend,
        pytest.raises(BackendError, match=r"conditioner: .* cannot load this engine") as caught,
    ):
        backend.load(bundle_graph(bundle, "conditioner", "fp16"), "fp16")
    assert "CUDA driver version is insufficient" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("tensorrt-rtx-*")) == []  # unproved, so not kept
    assert gpu.leaks() == []
