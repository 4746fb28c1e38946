"""Writes tests/engines/trt_api.json: the names and signatures that TensorRT's modules really have.

    python scripts/trt_api_table.py [VERSION ...]

TensorRT needs a GPU, its binding module does not: this downloads the bindings of each version, puts
libraries with the right names and entry points in place of TensorRT's own, imports the module and
reads it. Needs pip, gcc, and the Python version of the wheels that are downloaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "engines" / "trt_api.json"
PACKAGE = "tensorrt-cu12-bindings"
VERSIONS = ("10.12.0.36", "11.0.0.114", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Runs with the stand-ins: {class: {member: parameters of each overload, or null}}. Looked up in
# whole classes, so that a name which the engines begin to use needs no new table.
READ = """
import inspect, json, re, sys
import tensorrt_bindings as trt

def overloads(member):
    doc = inspect.getdoc(member) or ""
    found = re.findall(r"^(?:\\d+\\. )?\\w+\\((self: .*?)\\) ->", doc, re.MULTILINE)
    return found or None

table = {}
for name, kind in vars(trt).items():
    if inspect.isclass(kind) and kind.__module__.startswith("tensorrt"):
        table[name] = {m: overloads(getattr(kind, m)) for m in dir(kind) if m[0] != "_"}
table["__version__"] = trt.__version__
json.dump(table, sys.stdout)
"""
CLASSES = re.compile(
    r"(Builder|BuilderFlag|DataType|EngineInspector|ErrorCode|IBuilderConfig|ICudaEngine|ILayer"
    r"|ILogger|INetworkDefinition|IOptimizationProfile|IProgressMonitor|IStreamWriter|ITensor"
    r"|IConstantLayer|IConvolutionLayer|IDeconvolutionLayer|LayerInformationFormat|LayerType"
    r"|MemoryPoolType|NetworkDefinitionCreationFlag|OnnxParser|ParserError|ProfilingVerbosity"
    r"|ExecutionContextAllocationStrategy|IExecutionContext|IRuntimeCache|IRuntimeConfig|Runtime"
    r"|OnnxParserRefitter|Refitter|TensorIOMode|Weights)"
)


def stand_ins(folder: Path, major: str) -> None:
    """Libraries that do nothing; the module looks for them as it is imported."""
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)


def signature(text: str) -> list[str]:
    """Names of the parameters, those with a default with an equals sign; without self."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = (part.strip() for part in parts[1:])
    return [p.split(":")[0] + ("=" if re.search(r"[^=]=[^=]", p) else "") for p in named]


def read(version: str, folder: Path) -> dict[str, object]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*pip, f"{PACKAGE}=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    stand_ins(folder, version.partition(".")[0])
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", READ], env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    table = json.loads(done.stdout)
    assert table.pop("__version__") == version
    return {
        name: {
            member: [signature(text) for text in texts] if texts else None
            for member, texts in sorted(members.items())
        }
        for name, members in sorted(table.items())
        if CLASSES.fullmatch(name)
    }


def main() -> None:
    tables = {}
    for version in sys.argv[1:] or VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            tables[version] = read(version, Path(folder))
    # A class on each line: differences between versions stay readable.
    lines = []
    for version, classes in tables.items():
        rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(m)}" for n, m in classes.items())
        lines.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
