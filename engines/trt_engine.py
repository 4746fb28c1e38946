"""A TensorRT engine on device memory: plain runs, and calls that become captured work.

The first run of a call is a plain one, in a context that its profile's plain runs share. A call
that runs again gets a context of its own, because work captured from a context is undefined once
that context is changed. From then on it is one launch: of a CUDA graph captured here, or inside
TensorRT-RTX, which captures by itself. A later call with the same shapes and addresses (the next
request of the same kind) launches at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from gentron.contract import PRECISIONS
from gentron.engines.base import Buffer, Call, Engine, EngineInfo, Graph
from gentron.engines.compiler import Facts
from gentron.engines.device import CapturedWork
from gentron.engines.device_buffers import Arena, DeviceBuffer, device_buffers
from gentron.engines.trt_plan import Binding, Context, Plan
from gentron.engines.trt_profiles import choose
from gentron.errors import BackendError

# Calls with a context of their own, of one engine: two for each shape in use.
CAPTURES_KEPT = 8


@dataclass
class _Captured:
    context: Context
    work: CapturedWork | None  # None: TensorRT-RTX captures by itself
    scratch: int  # address


class TensorRtCall(Call):
    def __init__(self, engine: TensorRtEngine, binding: Binding, buffers: Mapping[str, Buffer]):
        self._engine, self._binding = engine, binding
        self._buffers = dict(buffers)  # so that no address outlives its memory
        self._runs = 0

    def run(self) -> None:
        self._engine.execute(self._binding, again=self._runs > 0)
        self._runs += 1


class TensorRtEngine(Engine):
    def __init__(
        self, graph: Graph, precision: str, plan: Plan, arena: Arena, info: tuple[str, str, str]
    ):
        """`info`: backend, device and version, for people."""
        self.component, self.compute = graph.component, graph.compute
        self.side_factor = graph.side_factor
        backend, device, version = info
        self.info = EngineInfo(
            graph.component.name, backend, device, PRECISIONS[precision], version
        )
        self._plan: Plan | None = plan
        self._arena, self._device = arena, arena.device
        self.profiles = plan.profiles
        self._outputs = tuple(spec.name for spec in graph.component.outputs)
        self._plain: dict[int, Context] = {}  # by profile
        self._captured: OrderedDict[Binding, _Captured] = OrderedDict()
        arena.holders.append(self._forget)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        dtype = self.component.tensor(name).numpy_dtype(self.compute)
        return DeviceBuffer(self._arena, shape, dtype, zeroed=name not in self._outputs)

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self._check_open()
        bound = device_buffers(self.component, buffers)
        sizes = self.component.bind({s.name: bound[s.name].shape for s in self.component.inputs})
        binding = Binding(
            choose(self.component, self.profiles, sizes, self.side_factor),
            tuple((name, buffer.shape) for name, buffer in bound.items()),
            tuple(buffer.memory.address for buffer in bound.values()),
        )
        return TensorRtCall(self, binding, bound)

    def execute(self, binding: Binding, *, again: bool) -> None:
        """Queues one run; `again` of a call that ran before."""
        with self._device.held():
            plan = self._check_open()
            captured = self._captured.get(binding)
            if captured is None and not again:
                self._plain_context(plan, binding.profile, binding).execute()
            elif captured is None:
                self._capture(plan, binding)
            else:
                self._captured.move_to_end(binding)
                if captured.work is not None:
                    captured.work.launch()
                else:
                    captured.context.execute()

    def close(self) -> None:
        """Captured work, contexts, engine: in this order."""
        with self._device.held():
            if self._plan is None:
                return
            self._arena.holders.remove(self._forget)
            self._device.synchronize()
            while self._captured:
                _close(self._captured.popitem()[1])
            while self._plain:
                self._plain.popitem()[1].close()
            self._plan.close()
            self._plan = None

    def inspect(self) -> Facts:
        """Which kernels it consists of, as TensorRT tells it."""
        with self._device.held():
            return self._check_open().inspect()

    @property
    def largest(self) -> Mapping[str, int]:
        axes = {axis for profile in self.profiles for axis in profile}
        return {axis: max(profile[axis].most for profile in self.profiles) for axis in axes}

    @property
    def captured_calls(self) -> int:
        return len(self._captured)

    def _plain_context(self, plan: Plan, profile: int, binding: Binding) -> Context:
        if profile not in self._plain:
            self._plain[profile] = plan.context(profile, captured=False)
        context = self._plain[profile]
        context.set_up(binding, self._outputs)
        return context

    def _capture(self, plan: Plan, binding: Binding) -> None:
        """A plain run in a context of its own, and right behind it the capture: the run updates
        what the context keeps, which must not happen inside a capture."""
        while len(self._captured) >= CAPTURES_KEPT:
            self._device.synchronize()
            _close(self._captured.popitem(last=False)[1])
        context = plan.context(binding.profile, captured=True)
        context.set_up(binding, self._outputs)
        context.execute()
        work = None if plan.captures_itself else self._device.capture(context.execute)
        self._captured[binding] = _Captured(context, work, self._arena.scratch(0).address)
        plan.keep_kernels()

    def _forget(self, addresses: set[int]) -> None:
        """Those addresses will be freed; nothing is running. Their bindings start anew."""
        for binding, captured in list(self._captured.items()):
            if addresses & {*binding.addresses, captured.scratch}:
                _close(self._captured.pop(binding))

    def _check_open(self) -> Plan:
        if self._plan is None:
            raise BackendError(f"{self.component.name}: used after close()")
        return self._plan


def _close(captured: _Captured) -> None:
    if captured.work is not None:
        captured.work.free()
    captured.context.close()
