"""What Triton Inference Server's Python backend calls: a `Service` in its stub process.

`execute` hands its requests to the service and returns, so those that come later join the steps
that are under way; each is answered when its picture is done (Triton 24.06 and later).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gentron.engines import EngineOptions
from gentron.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    GenTronError,
    RefusedError,
    RequestError,
)
from gentron.runtime.admission import Bounds
from gentron.runtime.pipeline import Pipeline
from gentron.runtime.result import Result
from gentron.runtime.scheduling import Capacity
from gentron.runtime.service import Options, Service

log = logging.getLogger(__name__)
# name, type in Triton's words; all hold one value, and all but the prompt may be left out
INPUTS = (
    ("prompt", "TYPE_STRING"),
    ("negative", "TYPE_STRING"),
    ("seed", "TYPE_UINT64"),
    ("steps", "TYPE_INT32"),
    ("guidance", "TYPE_FP32"),
    ("solver", "TYPE_STRING"),
    ("width", "TYPE_INT32"),
    ("height", "TYPE_INT32"),
)
OUTPUTS = (
    ("image", "TYPE_UINT8", (-1, -1, 3)),  # [H, W, 3]
    ("metadata", "TYPE_STRING", (1,)),  # JSON: all that is needed to make it again
)
CODES = (  # error -> attribute of TritonError
    (RequestError, "INVALID_ARG"),
    (RefusedError, "INVALID_ARG"),
    (CancelledError, "CANCELLED"),
    (BusyError, "UNAVAILABLE"),
    (DeadlineError, "UNAVAILABLE"),
)


class TritonPythonModel:
    """Triton makes one for each instance, and calls it by these names."""

    def initialize(self, args: dict[str, str]) -> None:
        """`args` as Triton gives them; the bundle lies beside `model.py`."""
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        parameters = json.loads(args["model_config"]).get("parameters", {})
        chosen = {name: entry.get("string_value", "") for name, entry in parameters.items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        on_gpu = args["model_instance_kind"] == "GPU"
        device = int(args["model_instance_device_id"]) if on_gpu else None
        pipeline = Pipeline.load(
            folder,
            backend=chosen.get("backend") or None,
            precision=chosen.get("precision") or None,
            options=EngineOptions(device=device),
        )
        samples = int(chosen.get("samples") or 8)
        bounds = Bounds(requests=int(chosen.get("requests") or 64))
        options = Options(bounds=bounds, capacity=Capacity(samples=samples))
        self._service = Service(pipeline, options, owns=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gentron-triton")
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Returns at once; the answers go through the requests' senders."""
        for request in requests:
            sender = request.get_response_sender()
            # Triton frees the inputs when this returns, so they are read here.
            inputs = {
                name: found.as_numpy()
                for name, _ in INPUTS
                if (found := self._triton.get_input_tensor_by_name(request, name)) is not None
            }
            asyncio.run_coroutine_threadsafe(self._answer(sender, inputs), self._loop)

    def finalize(self) -> None:
        """Ends what is under way with an error, and frees the engines."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._service.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others)

    async def _answer(self, sender: Any, inputs: dict[str, Any]) -> None:
        """Exactly one response, whatever happens."""
        try:
            response = self._response(await self._draw(sender, inputs))
        except GenTronError as error:
            response = self._failure(error, str(error))
        except Exception as error:
            log.exception("a request failed in a way that is no message to a client")
            response = self._failure(error, "internal error; the server's log has it")
        final = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        await asyncio.to_thread(sender.send, response, flags=final)  # waits for the server

    async def _draw(self, sender: Any, inputs: dict[str, Any]) -> Result:
        options = {name: one_value(name, array) for name, array in inputs.items()}
        if "prompt" not in options:
            raise RequestError("prompt", "is missing; send one string")
        native = self._service.pipeline.bundle.native_size
        size = (options.pop("width", native[0]), options.pop("height", native[1]))
        async with self._service.submit(options.pop("prompt"), size=size, **options) as ticket:
            async for _ in ticket:
                if sender.is_cancelled():
                    ticket.cancel()
            return await ticket.result()

    def _response(self, result: Result) -> Any:
        metadata = json.dumps(result.metadata(0)).encode()
        tensors = [
            self._triton.Tensor("image", np.ascontiguousarray(result.images[0])),
            self._triton.Tensor("metadata", np.array([metadata], np.object_)),
        ]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _failure(self, error: Exception, message: str) -> Any:
        named = (code for kind, code in CODES if isinstance(error, kind))
        kind = self._triton.TritonError
        problem = kind(message, getattr(kind, next(named, "INTERNAL")))
        return self._triton.InferenceResponse(error=problem)


def one_value(name: str, array: Any) -> Any:
    """What an input of one element holds. Raises RequestError for more or fewer."""
    if array.size != 1:
        raise RequestError(name, f"must hold one value, got shape {list(array.shape)}")
    value = array.reshape(-1)[0]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RequestError(name, "is not valid UTF-8 text") from error
    if isinstance(value, str):
        return value
    return float(value) if isinstance(value, np.floating) else int(value)
