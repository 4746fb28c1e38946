"""The NVIDIA GPU of this machine, as far as engines depend on it; seen through cuda.core."""

from __future__ import annotations

from dataclasses import dataclass

from gentron.errors import BackendError


@dataclass(frozen=True)
class GpuIdentity:
    """What an engine that was tuned on a device is tied to."""

    name: str
    capability: tuple[int, int]  # compute capability: major, minor
    driver: int  # major version of the kernel driver: 580 of 580.65.06

    @property
    def generation(self) -> str:
        """As targets are written: sm89."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def gpu_identity(backend: str, extra: str, index: int = 0) -> GpuIdentity:
    """Of GPU number `index`; raises BackendError where there is none, no driver, no cuda.core."""
    try:
        from cuda.core import Device, system
    except ImportError as error:
        raise BackendError(
            f"{backend}: needs cuda.core to see the GPU ({error}); run: "
            f"pip install 'gentron[{extra}]'"
        ) from error
    try:
        device = Device(index)
        major, minor = device.compute_capability
        driver = system.get_kernel_mode_driver_version()[0]
        return GpuIdentity(str(device.name), (int(major), int(minor)), int(driver))
    except Exception as error:  # cuda.core raises RuntimeErrors of several libraries
        text = " ".join(str(error).split())
        raise BackendError(
            f"{backend}: no usable NVIDIA GPU on this machine ({type(error).__name__}: {text}); "
            "check that nvidia-smi shows one"
        ) from error
