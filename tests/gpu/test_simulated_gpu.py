"""The simulated GPU notices what a real one would silently get wrong: each test plants one bug."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gentron.bundle import Bundle
from gentron.engines import bundle_graph
from gentron.engines.device_buffers import Arena, DeviceBuffer, Staging
from gentron.probe import load_probes, probe_inputs

ONES = np.ones(64, np.uint8)


@pytest.fixture
def held(gpu):
    with gpu.held():
        yield gpu


@pytest.fixture
def bound(tiny_bundle, gpu, backend_on):
    """The denoiser with buffers for every tensor, filled from a probe."""
    bundle = Bundle.open(tiny_bundle)
    engine = backend_on(gpu).load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    case, reference = load_probes(bundle.path / bundle.manifest.probes["denoiser"])[0]
    inputs = probe_inputs(engine.component, case)
    buffers = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    for name, values in inputs.items():
        buffers[name].write(values)
    for name, values in reference.items():
        buffers[name] = engine.buffer(name, values.shape)
    yield engine, buffers, reference
    engine.close()


def test_a_copy_that_was_not_waited_for_has_not_happened(held, simulated):
    memory, host = held.allocate(256), held.allocate_host(256)
    held.clear(memory)
    held.download(host, memory, 64)
    with pytest.raises(simulated.Fault, match="before the copy into it was waited for"):
        host.take(0, 64)
    held.record().wait()
    assert not host.take(0, 64).any()


def test_overwriting_what_a_queued_copy_reads_is_noticed(held, simulated):
    memory, host = held.allocate(256), held.allocate_host(256)
    host.put(0, ONES)
    held.upload(memory, 0, host, 0, 64)
    host.put(64, ONES)  # beside it
    with pytest.raises(simulated.Fault, match="while a queued copy still reads it"):
        host.put(32, ONES)
    held.synchronize()
    host.put(32, ONES)


def test_memory_that_was_never_written_cannot_be_read(held, simulated):
    memory, host = held.allocate(256), held.allocate_host(256)
    host.put(0, ONES)
    held.upload(memory, 0, host, 0, 64)
    held.download(host, memory, 65)
    with pytest.raises(simulated.Fault, match="read before anything was written"):
        held.synchronize()


def test_freed_memory_cannot_be_used_and_not_be_freed_again(held, simulated):
    memory, host = held.allocate(256), held.allocate_host(256)
    held.clear(memory)
    memory.free()  # behind what is queued
    held.synchronize()
    with pytest.raises(simulated.Fault, match="used after it was freed"):
        held.download(host, memory, 64)
    with pytest.raises(simulated.Fault, match="freed twice"):
        memory.free()


def test_host_memory_is_not_freed_under_a_copy(held, simulated):
    memory, host = held.allocate(256), held.allocate_host(256)
    host.put(0, ONES)
    held.upload(memory, 0, host, 0, 64)
    with pytest.raises(simulated.Fault, match="under a queued copy"):
        host.free()


def test_use_from_a_thread_that_does_not_hold_the_gpu_is_noticed(held, simulated):
    memory, caught = held.allocate(256), []

    def other() -> None:
        try:
            held.clear(memory)
        except simulated.Fault as fault:
            caught.append(str(fault))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert caught == ["the GPU is used by a thread that does not hold it"]


def test_a_leak_is_named(held):
    held.allocate(512)
    assert held.leaks() == ["512 bytes of device memory"]


def test_an_output_that_overlaps_an_input_is_noticed_below_the_engine(bound, gpu, simulated):
    """The engine refuses it too; here its address is changed behind its back."""
    engine, buffers, _ = bound
    call = engine.bind(buffers)
    addresses = dict(
        zip([n for n, _ in call._binding.shapes], call._binding.addresses, strict=True)
    )
    addresses["next_state"] = addresses["state"]
    object.__setattr__(call._binding, "addresses", tuple(addresses.values()))
    with pytest.raises(simulated.Fault, match="next_state and state share memory"):
        call.run()


def test_an_output_that_is_also_an_input_is_refused_by_the_engine(bound):
    engine, buffers, _ = bound
    with pytest.raises(AssertionError, match="also an input"):
        engine.bind(buffers | {"next_state": buffers["state"]})


def test_a_tensor_freed_while_a_call_needs_it_is_noticed(bound, gpu, simulated):
    engine, buffers, _ = bound
    call = engine.bind(buffers)
    with gpu.held():
        gpu.synchronize()
        buffers["modulation"].memory.free()
    with pytest.raises(simulated.Fault, match="used after it was freed"):
        call.run()
    buffers["modulation"].memory.freeing = False  # so that the arena may free it in the end


def test_an_output_that_no_run_wrote_cannot_be_read(bound, simulated):
    _, buffers, _ = bound
    with pytest.raises(simulated.Fault, match="read before anything was written"):
        buffers["next_state"].read()


def test_memory_given_on_to_another_tensor_is_unwritten_again(gpu, simulated):
    arena = Arena(gpu)
    first = DeviceBuffer(arena, (64,), np.dtype(np.uint8), zeroed=False)
    first.write(ONES)
    address = first.memory.address
    assert first.read().all()
    del first
    second = DeviceBuffer(arena, (64,), np.dtype(np.uint8), zeroed=False)
    assert second.memory.address == address
    with pytest.raises(simulated.Fault, match="read before anything was written"):
        second.read()
    arena.close()


def test_work_captured_from_a_context_that_was_changed_since_is_noticed(bound, gpu, simulated):
    engine, buffers, _ = bound
    call = engine.bind(buffers)
    for _ in range(3):
        call.run()
    (captured,) = engine._captured.values()
    with gpu.held():
        captured.context._context.set_tensor_address("state", buffers["state"].memory.address)
    call.run()
    with pytest.raises(simulated.Fault, match="launched after its context was changed"):
        buffers["next_state"].read()


def test_a_capture_without_a_plain_run_before_it_is_noticed(bound, gpu, simulated):
    engine, buffers, _ = bound
    call = engine.bind(buffers)
    with gpu.held():
        context = engine._plan.context(0, captured=True)
        context.set_up(call._binding, ("next_state", "bad"))
        with pytest.raises(simulated.Fault, match="before a plain run"):
            gpu.capture(context.execute)


def test_staging_that_is_used_again_too_early_would_be_noticed(gpu, simulated, monkeypatch):
    """It waits for the fence of each segment; without the waiting the host overtakes the GPU."""
    with gpu.held():
        memory = gpu.allocate(1024)
        staging = Staging(gpu, segment=256, segments=2)
        for _ in range(6):
            staging.send(memory, np.ones(200, np.uint8))
        monkeypatch.setattr(simulated.SimulatedEvent, "wait", lambda event: None)
        three_segments = np.ones(600, np.uint8)
        with pytest.raises(simulated.Fault, match="while a queued copy still reads it"):
            staging.send(memory, three_segments)
        gpu.synchronize()
        memory.free()
        staging.free()


def test_closing_in_the_wrong_order_is_noticed(simulated, tiny_bundle, backend_on):
    gpu = simulated.SimulatedGpu()
    backend = backend_on(gpu)
    bundle = Bundle.open(tiny_bundle)
    engine = backend.load(bundle_graph(bundle, "conditioner", "fp32"), "fp32")
    case, _ = load_probes(bundle.path / bundle.manifest.probes["conditioner"])[0]
    engine.run(probe_inputs(engine.component, case))
    engine._plan._engine = None  # before its contexts
    assert gpu.faults == ["an engine is freed before its contexts"]
    engine.close()
