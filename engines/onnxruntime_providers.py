"""ONNX Runtime's providers for NVIDIA GPUs: what each needs, what of it is missing, its options.

Asking ONNX Runtime for a provider that cannot be loaded is a line in its log and a session on the
CPU. Here it is an error with the library that is missing. Source: onnxruntime-gpu 1.31.1, whose
CUDA provider parsed these options and whose TensorRT provider's library has their names, and the
header of onnxruntime-ep-nv-tensorrt-rtx-cu12 0.5.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.contract import Component
from gentron.engines.device_cuda import driver_missing, is_installed
from gentron.engines.shapes import Profile, tensor_shapes
from gentron.errors import BackendError

SHARED = "libonnxruntime_providers_shared.so"
RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
TF32 = "NVIDIA_TF32_OVERRIDE"  # read by all of NVIDIA's libraries when they are loaded
CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Provider:
    backend: str
    title: str
    name: str  # in ONNX Runtime
    library: str  # beside ONNX Runtime's own libraries; empty: a package of its own
    install: str  # what to run where it is missing
    compiles: bool  # for declared shapes, and keeps the result in a folder
    memory: str = "cuda"  # where bound tensors are, in ONNX Runtime's words

    def options(
        self,
        index: int,
        stream: int,
        component: Component,
        profiles: Sequence[Profile],
        folder: str,
    ) -> dict[str, str]:
        """For GPU `index`, on a stream that is not the provider's own. TF32 is off, and nothing is
        chosen by timing it, so that a run repeats."""
        common = {"device_id": str(index), "user_compute_stream": str(stream)}
        if self.name == CUDA:
            return common | {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        least, usual, most = _profile_texts(component, profiles)
        if self.library:  # TensorRT: without trt_fp16_enable the types of the graph are kept
            return common | {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": folder,
                "trt_profile_min_shapes": least,
                "trt_profile_opt_shapes": usual,
                "trt_profile_max_shapes": most,
            }
        return {
            "has_user_compute_stream": "1",
            "user_compute_stream": str(stream),
            "nv_profile_min_shapes": least,
            "nv_profile_opt_shapes": usual,
            "nv_profile_max_shapes": most,
            "nv_multi_profile_enable": "1" if len(profiles) > 1 else "0",
            "nv_runtime_cache_path": folder,
        }


PROVIDERS = {
    provider.backend: provider
    for provider in (
        Provider(
            backend="onnxruntime-cuda",
            title="ONNX Runtime's CUDA provider",
            name=CUDA,
            library="libonnxruntime_providers_cuda.so",
            install="pip uninstall -y onnxruntime; pip install 'gentron[gpu]'",
            compiles=False,
        ),
        Provider(
            backend="onnxruntime-tensorrt",
            title="ONNX Runtime's TensorRT provider",
            name="TensorrtExecutionProvider",
            library="libonnxruntime_providers_tensorrt.so",
            install="pip uninstall -y onnxruntime; pip install 'gentron[gpu]' 'tensorrt>=10,<11'",
            compiles=True,
        ),
        Provider(
            backend="onnxruntime-rtx",
            title="ONNX Runtime's TensorRT-RTX provider",
            name="NvTensorRTRTXExecutionProvider",
            library="",
            install="pip install 'gentron[gpu-rtx]'",
            compiles=True,
        ),
    )
}


def _profile_texts(component: Component, profiles: Sequence[Profile]) -> tuple[str, str, str]:
    """name:1x3x64x64,name:... for the least, usual and most of every profile."""
    texts: tuple[list[str], ...] = ([], [], [])
    for profile in profiles:
        for name, bounds in tensor_shapes(component, profile).items():
            for text, shape in zip(texts, bounds, strict=True):
                text.append(f"{name}:{'x'.join(map(str, shape))}")
    least, usual, most = (",".join(text) for text in texts)
    return least, usual, most


def missing(provider: Provider) -> str:
    """What is not there, in one line; loads something large only where there is a driver."""
    found = []
    if absent := driver_missing():
        found.append(absent)
    if not is_installed("cuda.core"):
        found.append("cuda.core is not installed (pip install 'cuda-core>=1.0,<2')")
    place = _folder("onnxruntime")
    if place is None:
        found.append(f"onnxruntime is not installed ({provider.install})")
    elif provider.library and not (place / "capi" / provider.library).is_file():
        found.append(f"the onnxruntime that is installed has no {provider.name} "
                     f"({provider.install})")  # fmt: skip
    elif not provider.library and _folder(RTX_PACKAGE) is None:
        found.append(f"{RTX_PACKAGE} is not installed ({provider.install})")
    elif not absent:
        found += filter(None, [_cannot_load(provider, place / "capi")])
    return "; ".join(found)


def set_up(provider: Provider, ort: Any) -> None:
    """Before the first session; raises BackendError."""
    if provider.name != CUDA and os.environ.setdefault(TF32, "0") != "0":
        raise BackendError(
            f"{provider.backend}: {TF32}={os.environ[TF32]} lets float32 be rounded to TF32, and "
            f"this provider has no option against it; set {TF32}=0"
        )
    if not provider.library:
        _register(ort)


def rtx_devices(ort: Any) -> list[Any]:
    """Of the plugin, one for each GPU that it can use."""
    name = PROVIDERS["onnxruntime-rtx"].name
    return [device for device in ort.get_ep_devices() if device.ep_name == name]


@functools.cache
def _register(ort: Any) -> None:
    provider = PROVIDERS["onnxruntime-rtx"]
    package = importlib.import_module(RTX_PACKAGE)
    try:
        ort.register_execution_provider_library(provider.name, package.get_library_path())
    except Exception as error:  # ONNX Runtime's own classes share no useful base
        raise BackendError(f"{provider.backend}: {one_line(error)}") from error


def _cannot_load(provider: Provider, libraries: Path) -> str:
    """The dynamic linker names the first library that it does not find."""
    if not provider.library:
        libraries = _folder(RTX_PACKAGE) or libraries
        for runtime in sorted(libraries.glob("libcudart.so.*")):  # which the package leaves to us
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        importlib.import_module(RTX_PACKAGE)  # loads TensorRT-RTX
        wanted = ["libonnxruntime_providers_nv_tensorrt_rtx.so"]
    else:
        _preload()
        wanted = [SHARED, provider.library]
    if provider.backend == "onnxruntime-tensorrt":
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            importlib.import_module("tensorrt")  # loads libnvinfer, wherever pip has put it
    for name in wanted:
        try:
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"{name} cannot be loaded: {one_line(error)} ({_remedy(provider)})"
    return ""


def _remedy(provider: Provider) -> str:
    if provider.name == CUDA:
        return "pip install 'onnxruntime-gpu[cuda,cudnn]', or CUDA's folder on LD_LIBRARY_PATH"
    return f"{provider.install}, or the library's folder on LD_LIBRARY_PATH"


def _preload() -> None:
    """CUDA's libraries out of pip's packages, if they are there; what it prints is of no use."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _folder(module: str) -> Path | None:
    """Of a package that is installed; imports nothing."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of what finds it
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
