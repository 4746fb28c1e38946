"""TensorRT engines: found, proved, refused and rebuilt, with what TensorRT said in one line."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gentron.bundle import Bundle
from gentron.engines import bundle_graph
from gentron.engines.graphs import declarations
from gentron.engines.trt_build import PLAN
from gentron.errors import BackendError, RequestError, ResourceError
from gentron.probe import in_compute_type, load_probes, probe_inputs


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def load(bundle, simulated, backend_on):
    """An engine on a GPU of its own."""

    def make(component="denoiser", precision="fp32", profiles=(), **options):
        backend = backend_on(simulated.SimulatedGpu(), **options)
        graph = bundle_graph(bundle, component, precision, declarations(bundle, profiles))
        return backend.load(graph, precision)

    return make


def probe_of(bundle, engine, number=0):
    cases = load_probes(bundle.path / bundle.manifest.probes[engine.component.name])
    case, reference = cases[number]
    inputs = in_compute_type(engine.component, probe_inputs(engine.component, case), engine.compute)
    return inputs, reference


def entries(tmp_path):
    return sorted((tmp_path / "engines").glob("tensorrt*/"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_fresh_engine_is_kept_only_after_its_probes(load, tmp_path, precision):
    engine = load(precision=precision)
    (folder,) = entries(tmp_path)
    found = json.loads((folder / "entry.json").read_text())["facts"]["probes"]
    assert found["passed"] >= 1
    assert 0 < found["worst_relative"] < 2e-2
    engine.close()


def test_an_engine_that_computes_something_else_is_not_kept(load, simulated, tmp_path, monkeypatch):
    original = simulated.Engine.__init__

    def negated(engine, *arguments):
        original(engine, *arguments)
        right = engine.session.run

        class Wrong:
            def run(self, outputs, feeds):
                return [-v if v.dtype == np.float32 else v for v in right(outputs, feeds)]

        engine.session = Wrong()

    monkeypatch.setattr(simulated.Engine, "__init__", negated)
    with pytest.raises(BackendError, match="the compiled denoiser is not what torch computes"):
        load()
    assert entries(tmp_path) == []


def test_a_second_start_finds_the_engine(load, simulated):
    compiler = simulated.SimulatedCompiler("tensorrt")
    load(compiler=compiler).close()
    load(compiler=compiler).close()
    assert compiler.compiled == ["denoiser"]


def test_an_engine_of_another_version_is_set_aside_and_built_again(
    load, bundle, simulated, caplog, tmp_path
):
    old = simulated.SimulatedCompiler("tensorrt", version="10.16.1")
    new = simulated.SimulatedCompiler("tensorrt", version="11.0.0")
    load(compiler=old, version="10.16.1").close()
    with caplog.at_level(logging.WARNING):
        engine = load(compiler=new)
    assert new.compiled == ["denoiser"]
    assert "Version tag does not match: 10.16.1" in caplog.text
    assert "set aside" in caplog.text
    inputs, reference = probe_of(bundle, engine)
    np.testing.assert_allclose(engine.run(inputs)["next_state"], reference["next_state"], atol=1e-4)
    engine.close()


def test_a_builder_that_only_makes_what_cannot_be_loaded_is_one_error(load, simulated):
    compiler = simulated.SimulatedCompiler("tensorrt", version="10.16.1")
    with pytest.raises(BackendError, match=r"TensorRT 11.0.0 cannot load this engine: Version tag"):
        load(compiler=compiler)
    assert compiler.compiled == ["denoiser"]


def test_tensorrt_rtx_says_what_its_header_tells(load, simulated):
    compiler = simulated.SimulatedCompiler("tensorrt-rtx", version="1.1.0")
    with pytest.raises(BackendError, match=r"cannot load this engine \(version mismatch\)"):
        load(compiler=compiler, name="tensorrt-rtx")


def test_an_engine_compiled_where_it_could_not_run_is_proved_when_it_is_loaded(
    load, tmp_path, bundle, monkeypatch
):
    load().close()
    (folder,) = entries(tmp_path)
    entry = json.loads((folder / "entry.json").read_text())
    entry["facts"].pop("probes")
    (folder / "entry.json").write_text(json.dumps(entry))
    from gentron.engines import proof

    proved = []
    monkeypatch.setattr(proof, "prove", lambda *a: proved.append(1) or {"probes": {
        "passed": 1, "worst_relative": 0.0}})  # fmt: skip
    load().close()
    assert proved == [1]


def test_a_tensor_outside_every_profile_names_axis_range_and_what_to_build(load, bundle):
    engine = load(profiles=("samples=1:1:2,rows=1:2:4",))
    inputs, _ = probe_of(bundle, engine)
    rows = {n: np.concatenate([inputs[n]] * 3) for n in inputs if n.startswith("row_")}
    with pytest.raises(
        RequestError,
        match=r"not compiled for 6 branch rows \(R is 1 to 4\).*--profile rows=1:2:6",
    ):
        engine.run(inputs | rows)
    engine.close()


def test_a_size_outside_every_profile_is_said_in_pixels(load, bundle):
    engine = load("vae_decoder")
    factor, channels = bundle.vae_factor, bundle.config.latent_channels
    width = bundle.config.sample_width
    latents = np.zeros((1, channels, bundle.config.sample_height, width + 2), np.float32)
    with pytest.raises(
        RequestError, match=rf"a width of {(width + 2) * factor} pixels \(w is"
    ) as e:
        engine.run({"latents": latents})
    assert f"--profile size={(width + 2) * factor}x" in str(e.value)
    engine.close()


def test_the_profile_whose_usual_sizes_fit_is_chosen(load, bundle):
    native = f"{bundle.native_size[0]}x{bundle.native_size[1]}"
    wide = f"{bundle.native_size[0] * 2}x{bundle.native_size[1]}"
    engine = load("vae_decoder", profiles=(f"size={wide}", f"size={native}"))
    inputs, reference = probe_of(bundle, engine)
    np.testing.assert_allclose(engine.run(inputs)["pixels"], reference["pixels"], atol=1e-3)
    assert list(engine._plain) == [1]
    engine.close()


def test_replay_equals_the_plain_run_to_the_bit(load, bundle):
    engine = load()
    inputs, _ = probe_of(bundle, engine)
    plain = engine.run(inputs)
    buffers = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    buffers |= {name: engine.buffer(name, values.shape) for name, values in plain.items()}
    for name, values in inputs.items():
        buffers[name].write(values)
    call, found = engine.bind(buffers), []
    for _ in range(4):
        call.run()
        found.append(buffers["next_state"].read())
    assert engine.captured_calls == 1
    for values in found:
        np.testing.assert_array_equal(values, plain["next_state"])
    engine.close()


def test_work_that_was_captured_with_smaller_scratch_is_captured_anew(
    load, bundle, gpu, backend_on
):
    """A larger shape needs a larger block for all; what was captured with the old one must go."""
    engine = load()
    inputs, _ = probe_of(bundle, engine)
    small = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    outputs = engine.run(inputs)
    small |= {name: engine.buffer(name, values.shape) for name, values in outputs.items()}
    for name, values in inputs.items():
        small[name].write(values)
    call = engine.bind(small)
    for _ in range(3):
        call.run()
    assert engine.captured_calls == 1
    more = dict(inputs)
    for name in ("row_sample", "row_modulation", "row_text"):
        if name in more:
            more[name] = np.concatenate([more[name]] * 6)
    engine.run(more)
    assert engine.captured_calls == 0
    for _ in range(3):
        call.run()
        np.testing.assert_array_equal(small["next_state"].read(), outputs["next_state"])
    assert engine.captured_calls == 1
    engine.close()


def test_memory_that_ran_out_is_given_back_by_what_is_idle_first(simulated, bundle, backend_on):
    gpu = simulated.SimulatedGpu()
    engine = backend_on(gpu).load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    kept = engine.buffer("noise", (1, 1, 4, 64, 64))
    del kept
    with gpu.held():
        used = engine._arena.tensors.used_bytes
    assert used == 0
    gpu.memory = gpu.used_bytes + 1024
    big = engine.buffer("noise", (1, 1, 4, 64, 66))  # only if the first goes
    assert big.read().shape == (1, 1, 4, 64, 66)
    with pytest.raises(ResourceError, match="no memory left"):
        engine.buffer("noise", (64, 1, 4, 512, 512))
    del big
    engine.close()


def test_memory_of_a_request_that_was_dropped_is_found_again_when_it_is_needed(
    simulated, bundle, backend_on
):
    gpu = simulated.SimulatedGpu()
    engine = backend_on(gpu).load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    gc.disable()
    try:
        cycle = [engine.buffer("noise", (1, 1, 4, 64, 64))]
        cycle.append(cycle)
        del cycle
        gpu.memory = gpu.used_bytes + 1024
        engine.buffer("noise", (1, 1, 4, 64, 66))
    finally:
        gc.enable()
    engine.close()


def test_a_closed_engine_and_a_closed_backend_say_so(bundle, gpu, backend_on):
    backend = backend_on(gpu)
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    inputs, _ = probe_of(bundle, engine)
    buffer = engine.buffer("state", inputs["state"].shape)
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match=r"denoiser: used after close\(\)"):
        engine.run(inputs)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="after the backend was closed"):
        buffer.read()
    with pytest.raises(BackendError, match=r"used after close\(\); load again"):
        backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")


def test_a_call_that_tensorrt_refuses_is_one_line_with_what_it_said(
    load, bundle, simulated, monkeypatch
):
    def refuse(context, name, address):
        context.module.say("setTensorAddress: the\n pointer is odd")
        return False

    engine = load()
    engine._plain.clear()  # so that addresses are set anew
    monkeypatch.setattr(simulated.Context, "set_tensor_address", refuse)
    with pytest.raises(BackendError, match=r"denoiser: address of .* the pointer is odd") as caught:
        engine.run(probe_of(bundle, engine)[0])
    assert "\n" not in str(caught.value)
    engine.close()


def test_kernels_finished_on_the_gpu_are_kept_and_met_again(load, simulated, monkeypatch):
    original, loaded = simulated.RuntimeCache.deserialize, []

    def watch(cache, blob):
        loaded.append(len(json.loads(blob)))
        return original(cache, blob)

    monkeypatch.setattr(simulated.RuntimeCache, "deserialize", watch)
    load(name="tensorrt-rtx").close()
    loaded.clear()
    load(name="tensorrt-rtx").close()
    assert loaded[-1] >= 1


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x"])
def test_damaged_kernels_are_dropped_with_one_line(load, caplog, damage, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    load(name="tensorrt-rtx").close()
    (file,) = (tmp_path / "cache" / "gentron" / "kernels").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        load(name="tensorrt-rtx").close()
    assert "is damaged; dropped" in caplog.text
    assert file.read_bytes()  # made again


def test_kernels_of_another_driver_are_dropped(load, caplog, monkeypatch, tmp_path, simulated):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    load(name="tensorrt-rtx").close()
    monkeypatch.setattr(simulated.RuntimeCache, "deserialize", lambda cache, blob: False)
    with caplog.at_level(logging.WARNING):
        load(name="tensorrt-rtx").close()
    assert "another version or for another GPU or driver; dropped" in caplog.text


def test_kernels_that_others_could_have_written_are_not_loaded(
    load, caplog, monkeypatch, tmp_path, simulated
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    load(name="tensorrt-rtx").close()
    folder = tmp_path / "cache" / "gentron" / "kernels"
    folder.chmod(0o777)

    def never(cache, blob):
        raise AssertionError("loaded")

    monkeypatch.setattr(simulated.RuntimeCache, "deserialize", never)
    with caplog.at_level(logging.WARNING):
        load(name="tensorrt-rtx").close()
    assert "others can write to" in caplog.text
    assert "kernels cannot be kept" in caplog.text


def test_only_the_calls_used_last_keep_a_context_of_their_own(load, bundle, monkeypatch):
    monkeypatch.setattr("gentron.engines.trt_engine.CAPTURES_KEPT", 2)
    engine = load("vae_decoder")
    inputs, reference = probe_of(bundle, engine)
    calls = []
    for _ in range(3):
        buffers = {"latents": engine.buffer("latents", inputs["latents"].shape)}
        buffers["pixels"] = engine.buffer("pixels", reference["pixels"].shape)
        buffers["latents"].write(inputs["latents"])
        calls.append((engine.bind(buffers), buffers["pixels"]))
    for call, _ in calls * 3:
        call.run()
    assert engine.captured_calls == 2
    for call, pixels in calls:
        call.run()
        np.testing.assert_allclose(pixels.read(), reference["pixels"], atol=1e-3)
    engine.close()


def test_an_engine_whose_profiles_hold_no_probe_is_kept_with_a_warning(load, bundle, caplog):
    side = bundle.native_size[0] * 2
    with caplog.at_level(logging.WARNING):
        load("vae_decoder", profiles=(f"size={side}x{side}",)).close()
    assert "no golden probe lies within the profiles" in caplog.text


def test_rtx_finishes_kernels_before_a_run_and_not_during_it(load, bundle):
    """A faster kernel that came in between would change the last bits of a run."""
    engine = load(name="tensorrt-rtx")
    inputs, _ = probe_of(bundle, engine)
    engine.run(inputs)
    (context,) = engine._plain.values()
    assert context._config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert context._config.cuda_graph_strategy.name == "DISABLED"
    engine.close()


def test_an_engine_with_other_tensors_is_not_used(load, simulated):
    class Renaming(simulated.SimulatedCompiler):
        def compile(self, job, folder, report):
            facts = super().compile(job, folder, report)
            text = (folder / PLAN).read_text().replace('"guidance"', '"guide"')
            (folder / PLAN).write_text(text)
            return facts

    with pytest.raises(BackendError, match="tensors guidance, guide are not the contract's"):
        load(compiler=Renaming("tensorrt"))


def test_an_unsupported_gpu_is_named_with_what_to_use(simulated, backend_on):
    hopper = simulated.SimulatedGpu(capability=(9, 0))
    with pytest.raises(
        BackendError,
        match=r"tensorrt-rtx: TensorRT-RTX does not run on Simulated GPU \(sm90\); use --backend t",
    ):
        backend_on(hopper, "tensorrt-rtx")
    with pytest.raises(BackendError, match=r"needs a GPU of sm75 or later, .* is sm70"):
        backend_on(simulated.SimulatedGpu(capability=(7, 0)))


def test_a_graph_without_a_digest_is_never_looked_up(bundle, gpu, backend_on):
    graph = replace(bundle_graph(bundle, "denoiser", "fp32"), digest="")
    with pytest.raises(AssertionError, match="digest"):
        backend_on(gpu).load(graph, "fp32")
