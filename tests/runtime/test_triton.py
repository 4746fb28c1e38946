"""The model repository for Triton: its configuration read by Triton's own schema, and its model.py
run against a stand-in for the module that Triton gives it. No Triton server runs here."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format

from gentron.bundle import Bundle
from gentron.errors import BundleError, RequestError
from gentron.runtime.triton_repository import write_repository

TO_NUMPY = {"TYPE_STRING": np.object_, "TYPE_UINT64": np.uint64, "TYPE_INT32": np.int32,
            "TYPE_FP32": np.float32, "TYPE_UINT8": np.uint8}  # fmt: skip


def module_from(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_config() -> Any:
    """Triton's own message type, without the gRPC client around it."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    return module_from(file, "model_config_pb2").ModelConfig


@pytest.fixture(scope="session")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton")
    write_repository(target, tiny_bundle)
    return target


# ---- the stand-in, after the documentation of Triton's Python backend


class Tensor:
    def __init__(self, name: str, array: Any):
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError(Exception):
    UNKNOWN, INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = range(5)

    def __init__(self, message: str, code: int = INTERNAL):
        self.text, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None):
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Sender:
    """Of a model that is not decoupled: one response, the last."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.cancelled, self._final = False, threading.Event()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self._final.is_set(), "sent after the final response"
        self.responses.append(response)
        if flags == 1:
            self._final.set()

    def response(self) -> InferenceResponse:
        assert self._final.wait(60), "never answered"
        (response,) = self.responses
        return response


class InferenceRequest:
    def __init__(self, config: Any, values: dict[str, Any]):
        inputs = {one.name: one for one in config.input}
        kinds = config.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"]
        names = kinds.enum_type.values_by_number
        self.tensors = {
            name: Tensor(name, np.array(
                value if isinstance(value, list) else [value],
                TO_NUMPY[names[inputs[name].data_type].name],
            ))
            for name, value in values.items()
        }  # fmt: skip
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    kinds = (Tensor, TritonError, InferenceResponse, InferenceRequest)
    vars(module).update({kind.__name__: kind for kind in kinds})
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def config(repository: Path, model_config: Any) -> Any:
    text = (repository / "gentron" / "config.pbtxt").read_text("utf-8")
    return text_format.Parse(text, model_config())


@pytest.fixture
def model(repository: Path, config: Any, triton: ModuleType) -> Any:
    """As Triton loads it."""
    made = module_from(repository / "gentron" / "1" / "model.py", "model").TritonPythonModel()
    as_json = json_format.MessageToJson(config, preserving_proto_field_name=True)
    made.initialize({
        "model_config": as_json,
        "model_repository": str(repository / "gentron"),
        "model_version": "1",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })  # fmt: skip
    yield made
    made.finalize()


def asked(config: Any, i: int, **more: Any) -> InferenceRequest:
    prompt = ("a red apple", "a cat", "Schnee im Mai, ❄")[i % 3].encode()
    values = {"prompt": prompt, "seed": 2**64 - 1 - i, "steps": 2 + i, "width": 16, "height": 16}
    return InferenceRequest(config, values | more)


def test_triton_reads_the_configuration(config: Any) -> None:
    assert (config.name, config.backend, config.max_batch_size) == ("gentron", "python", 0)
    assert [one.name for one in config.input if not one.optional] == ["prompt"]
    assert {one.name: list(one.dims) for one in config.output} == {
        "image": [-1, -1, 3], "metadata": [1],
    }  # fmt: skip
    assert not config.model_transaction_policy.decoupled


def test_requests_of_several_calls_get_their_offline_pictures(model, config, tiny_pipeline) -> None:
    requests = [asked(config, i) for i in range(6)]
    requests.append(asked(config, 1, negative=b"a dog", guidance=6.5, solver=b"ddim"))
    assert model.execute(requests[:3]) is None  # returns before they are done
    assert model.execute(requests[3:]) is None
    for request in requests:
        outputs = request.sender.response().outputs
        metadata = json.loads(outputs["metadata"][0])
        values = {name: tensor.as_numpy()[0] for name, tensor in request.tensors.items()}
        wanted = tiny_pipeline(
            values["prompt"].decode(),
            seed=int(values["seed"]),
            steps=int(values["steps"]),
            size=(16, 16),
            negative=values.get("negative", b"").decode(),
            guidance=float(values["guidance"]) if "guidance" in values else None,
            solver=values["solver"].decode() if "solver" in values else None,
        )
        assert outputs["image"].dtype == np.uint8
        assert outputs["image"].shape == (16, 16, 3)
        assert np.abs(outputs["image"].astype(int) - wanted.images[0]).max() <= 1
        assert metadata["row_seed"] == values["seed"]


def test_what_is_wrong_with_a_request_is_its_answer_and_others_go_on(model, config) -> None:
    wrong = {
        "steps": asked(config, 0, steps=0),
        "size": asked(config, 0, width=17),
        "seed": asked(config, 0, seed=[1, 2]),
        "prompt": asked(config, 0, prompt=b"\xff"),
    }
    right = asked(config, 0)
    model.execute([*wrong.values(), right])
    for field, request in wrong.items():
        error = request.sender.response().error
        assert error.code == TritonError.INVALID_ARG
        assert error.text.startswith(f"{field}: ")
    assert right.sender.response().error is None


def test_a_request_that_its_client_cancels_ends(model, config) -> None:
    request = asked(config, 0, steps=200)
    request.sender.cancelled = True
    model.execute([request])
    assert request.sender.response().error.code == TritonError.CANCELLED


def test_the_end_of_the_model_answers_what_is_under_way(model, config) -> None:
    request = asked(config, 0, steps=200)
    model.execute([request])
    model.finalize()
    assert request.sender.response().error.code == TritonError.CANCELLED
    model.finalize = lambda: None  # the fixture's turn


def test_a_repository_is_not_written_over(repository: Path, tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="is there already"):
        write_repository(repository, tiny_bundle)


def test_what_is_no_bundle_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        write_repository(tmp_path / "models", tmp_path)
    assert not (tmp_path / "models").exists()


def test_the_bundle_in_it_is_whole(repository: Path, tiny_bundle: Path) -> None:
    inside = Bundle.open(repository / "gentron" / "1" / "bundle", verify="all")
    assert inside.digest == Bundle.open(tiny_bundle).digest
