"""TensorRT and TensorRT-RTX: everything in which the two, and their versions, differ.

TensorRT tunes kernels on a GPU and so builds only for the one it runs on. TensorRT-RTX compiles for
generations of GPUs on any machine, and finishes the kernels where they run. Source: the binding
modules of TensorRT 10.12, 11.0 and 11.4 and of TensorRT-RTX 1.7, whose names a test compares.

Stripped plans, whose weights come from the bundle when they are loaded, are TensorRT's alone:
TensorRT-RTX makes them only where there is a GPU. The timing cache is left out: TensorRT-RTX
ignores it; TensorRT would rebuild faster with it, and tunes anew instead.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gentron.errors import BackendError, RequestError

FIELD = "gpu"  # the option at fault, in errors
PORTABLE_FROM = (8, 0)  # without targets: 8.0, 8.6, 8.9, 12.0 and later, not Turing
# Data-centre generations, which TensorRT-RTX has no members for.
TENSORRT_ONLY = frozenset({"sm90", "sm100", "sm101", "sm103"})
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class Flavor:
    backend: str
    title: str
    modules: tuple[str, ...]  # the package, and the bindings where they were installed alone
    extra: str  # of this project: pip install 'gentron[EXTRA]'
    least: tuple[int, int]  # version
    below: tuple[int, int]
    cross_compiles: bool  # for GPUs that this machine does not have
    header: bytes  # that plans begin with; empty: not known

    def load(self) -> Any:
        """The module; raises BackendError if it is missing, broken or of an untested version."""
        trt = self._import()
        found = re.match(r"(\d+)\.(\d+)", trt.__version__)
        if not found or not self.least <= (int(found[1]), int(found[2])) < self.below:
            least, below = (".".join(map(str, v)) for v in (self.least, self.below))
            raise BackendError(
                f"{self.backend}: needs {self.title} {least} or later, below {below}; found "
                f"{trt.__version__}; run: {self._install}"
            )
        return trt

    @property
    def _install(self) -> str:
        return f"pip install 'gentron[{self.extra}]'"

    def _import(self) -> Any:
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                if isinstance(error, ModuleNotFoundError) and error.name == name:
                    continue
                text = " ".join(str(error).split())
                raise BackendError(
                    f"{self.backend}: {self.title} cannot be loaded ({text}); run: {self._install}"
                ) from error
        raise BackendError(f"{self.backend}: {self.title} is not installed; run: {self._install}")

    def network_flags(self, trt: Any) -> int:
        """Types of the graph are kept: to be asked for before version 11, which knows nothing
        else and deprecates the flag; TensorRT-RTX takes it without complaint."""
        if self.backend == "tensorrt" and int(trt.__version__.split(".")[0]) >= 11:
            return 0
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def streams(self, trt: Any) -> bool:
        """Whether plans can be written while they are made: not in TensorRT 10.12."""
        return hasattr(trt, "IStreamWriter") and hasattr(
            trt.Builder, "build_serialized_network_to_stream"
        )

    def targets(self, names: Sequence[str]) -> tuple[str, ...]:
        """The generations in one order, each once; raises RequestError for one it cannot make."""
        if not self.cross_compiles:
            if names:
                raise RequestError(
                    FIELD,
                    f"{self.title} compiles for the GPU that it runs on, and cannot be told "
                    f"{', '.join(names)}; leave it out, and compile on the machine with that GPU",
                )
            return ()
        for name in names:
            if name in TENSORRT_ONLY:
                raise RequestError(
                    FIELD,
                    f"{self.title} does not compile for {name}; use --backend tensorrt on that "
                    "machine",
                )
            if name not in RTX_TARGETS:
                raise RequestError(
                    FIELD, f"unknown GPU generation {name!r}; one of {', '.join(RTX_TARGETS)}"
                )
        return tuple(name for name in RTX_TARGETS if name in names)

    def set_targets(
        self, trt: Any, config: Any, names: Sequence[str], require: Callable[[bool, str], object]
    ) -> None:
        """`require(value, what)` fails for False. Without names the plan is portable."""
        if not names:
            return
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            capability = getattr(trt.ComputeCapability, name.upper(), None)
            if capability is None:
                raise RequestError(
                    FIELD, f"{self.title} {trt.__version__} does not know {name}; leave it out"
                )
            require(config.set_compute_capability(capability, index), f"choosing {name}")

    def runs_on(self, targets: Sequence[str], capability: tuple[int, int]) -> bool:
        """Whether a cross-compiled engine runs on a GPU."""
        generation = f"sm{capability[0]}{capability[1]}"
        if targets:
            return generation in targets
        return capability >= PORTABLE_FROM and generation not in TENSORRT_ONLY


FLAVORS = {
    flavor.backend: flavor
    for flavor in (
        Flavor(
            backend="tensorrt",
            title="TensorRT",
            modules=("tensorrt", "tensorrt_bindings"),
            extra="tensorrt",
            least=(10, 12),
            below=(12, 0),
            cross_compiles=False,
            header=b"",
        ),
        Flavor(
            backend="tensorrt-rtx",
            title="TensorRT-RTX",
            modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
            extra="rtx",
            least=(1, 1),
            below=(2, 0),
            cross_compiles=True,
            header=b"vtrt",
        ),
    )
}
