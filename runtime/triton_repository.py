"""A model repository for Triton Inference Server: its Python backend runs `triton_model.py`.

DIR/gentron/config.pbtxt
DIR/gentron/1/model.py
DIR/gentron/1/bundle/       the bundle
DIR/README.md
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gentron import __version__
from gentron.bundle import Bundle
from gentron.errors import OutputError, RequestError
from gentron.runtime.triton_model import INPUTS, OUTPUTS

MODEL = "gentron"
MODEL_PY = '''"""Found by Triton's Python backend; gentron has to be installed for its Python."""

from gentron.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CONFIG = """\
# Written by gentron-export {version}.
name: "gentron"
backend: "python"
max_batch_size: 0  # requests share every step, whenever they came: gentron batches, not Triton
{inputs}
{outputs}
# One on each GPU, or one on the CPUs. For a CPU backend beside GPUs write KIND_CPU.
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
# Empty: gentron's own choice. samples: of one size that step together; requests: taken on at once.
parameters {{ key: "backend" value {{ string_value: "" }} }}
parameters {{ key: "precision" value {{ string_value: "" }} }}
parameters {{ key: "samples" value {{ string_value: "8" }} }}
parameters {{ key: "requests" value {{ string_value: "64" }} }}
"""
README = """\
# {name} for Triton Inference Server

A model repository with one model, `gentron`, in Triton's Python backend; 24.06 or later.

1. An image whose Python has gentron, from the folder with gentron's `pyproject.toml`:

       FROM nvcr.io/nvidia/tritonserver:YY.MM-py3
       COPY . /gentron
       RUN pip install -c /gentron/constraints.txt '/gentron[EXTRA]'

   EXTRA is `cpu`, `openvino`, `gpu`, `tensorrt` or `rtx`. gentron needs Python 3.11 or later, and
   that of the image has to be the one that its Python backend was built for.

2. The server:

       docker run --rm --gpus all -p 8000:8000 -p 8001:8001 --shm-size 1g \\
           -v HERE:/models IMAGE tritonserver --model-repository /models

3. A request:

       import numpy as np
       import tritonclient.http as triton

       prompt = triton.InferInput("prompt", [1], "BYTES")
       prompt.set_data_from_numpy(np.array([b"a red apple"], np.object_))
       seed = triton.InferInput("seed", [1], "UINT64")
       seed.set_data_from_numpy(np.array([7], np.uint64))
       answer = triton.InferenceServerClient("localhost:8000").infer("gentron", [prompt, seed])
       picture = answer.as_numpy("image")  # [H, W, 3], uint8

Inputs: {inputs}. All but the prompt may be left out. The same seed, settings and bundle draw the
same picture as `gentron-run image`.
"""


def write_repository(target: Path, bundle: str | Path | None = None) -> Path:
    """Writes a repository around a bundle: by packaged name or folder, or the one that
    `bundle_folder(target)` holds already. Files are linked where they can be, else copied. Returns
    the model's folder. Raises BundleError, RequestError if a model is there, OutputError."""
    model, inside = target / MODEL, bundle_folder(target)
    try:
        if bundle is not None:
            check_free(target)
            source = Bundle.open(bundle)
            source.check_complete()
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source.path, inside, copy_function=_link)
        name = Bundle.open(inside).manifest.name
        (model / "config.pbtxt").write_text(config_text(), "utf-8")
        (inside.parent / "model.py").write_text(MODEL_PY, "utf-8")
        inputs = ", ".join(f"`{name}` ({kind.removeprefix('TYPE_')})" for name, kind in INPUTS)
        (target / "README.md").write_text(README.format(name=name, inputs=inputs), "utf-8")
    except OSError as error:
        raise OutputError(f"{target}: the model repository cannot be written: {error}") from error
    return model


def bundle_folder(target: Path) -> Path:
    return target / MODEL / "1" / "bundle"


def check_free(target: Path) -> None:
    """Raises RequestError if the repository has this model already."""
    if (target / MODEL).exists():
        raise RequestError(
            "triton", f"{target / MODEL} is there already; remove it, or name another"
        )


def config_text() -> str:
    """`config.pbtxt`, a ModelConfig of Triton in protobuf's text format."""
    inputs = ",\n".join(
        f'  {{ name: "{name}" data_type: {kind} dims: [ 1 ]'
        f"{'' if name == 'prompt' else ' optional: true'} }}"
        for name, kind in INPUTS
    )
    outputs = ",\n".join(
        f'  {{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ] }}'
        for name, kind, dims in OUTPUTS
    )
    return CONFIG.format(
        version=__version__, inputs=f"input [\n{inputs}\n]", outputs=f"output [\n{outputs}\n]"
    )


def _link(source: str, target: str) -> None:
    """A second name for the same bytes; a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
