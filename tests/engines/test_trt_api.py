"""The compiler calls TensorRT by names that it has, in every version that it claims to support.

TensorRT itself needs a GPU, its names do not: `trt_api.json` was read from its binding modules by
scripts/trt_api_table.py. TensorRT-RTX is asked directly.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ENGINES = Path(__file__).resolve().parents[2] / "engines"
PARTS = ("build", "flavor", "inspect", "log", "network", "progress")
FILES = [ENGINES / f"trt_{part}.py" for part in PARTS]  # of the compiler
TABLES = json.loads(Path(__file__).with_name("trt_api.json").read_text("utf-8"))
VERSIONS = tuple(TABLES)
# What the variables of the compiler's code hold.
CLASSES = {
    "builder": ("Builder",),
    "config": ("IBuilderConfig",),
    "engine": ("ICudaEngine",),
    "inspector": ("EngineInspector",),
    "network": ("INetworkDefinition",),
    "parser": ("OnnxParser",),
    "problem": ("ParserError",),
    "profile": ("IOptimizationProfile",),
    "raw": ("ILayer", "IConstantLayer", "IConvolutionLayer", "IDeconvolutionLayer"),
    "stored": ("Weights",),
    "tensor": ("ITensor",),
}
# Behind a question in trt_flavor: cross-compiling is TensorRT-RTX's, streams are newer than 10.12.
CROSS = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
STREAMS = {"IStreamWriter", "IStreamWriter.__init__", "Builder.build_serialized_network_to_stream"}
ABSENT = {"10.12.0.36": CROSS | STREAMS, "11.0.0.114": CROSS, "11.4.0.106": CROSS}
REMOVED = [  # in version 11
    r"BuilderFlag\.(FP16|BF16|INT8|FP8|INT4|FP4|WEIGHTLESS|REJECT_EMPTY_ALGORITHMS)",
    r"(OBEY|PREFER)_PRECISION_CONSTRAINTS",
    r"set_output_type|reset_output_type|reset_precision|output_type_is_set|precision_is_set",
    r"compute_precision|dynamic_range|IInt8\w*Calibrator|QuantizationFlag|EXPLICIT_BATCH",
    r"IAlgorithm|algorithm_selector|TacticSource\.(CUBLAS|CUDNN)",
    r"create_execution_context_without_device_memory|get_device_memory_size_for_profile\b(?!_v2)",
    r"\bdevice_memory_size\b(?!_v2)|\b(minimum_)?weight_streaming_budget\b(?!_v2)",
    r"platform_has_|has_implicit_batch_dimension|all_shape_inputs_specified",
    r"supports_model\b(?!_v2)|parse_with_weight_descriptors|SubGraphCollection|IStreamReader\b",
    r"PROFILE_SHARING_0806",
]


class Use(NamedTuple):
    """One name of TensorRT's in our source."""

    names: tuple[str, ...]  # any of which will do: Class, or Class.member
    arguments: int | None  # by position, if it is called with plain ones
    line: int


def uses(source: str) -> Iterator[Use]:
    """trt.X, trt.X.Y, and members of the variables in `CLASSES`."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        names: tuple[str, ...] = ()
        match node.value:
            case ast.Name(id="trt") if not node.attr.startswith("__"):
                names = (node.attr,)
            case ast.Attribute(value=ast.Name(id="trt"), attr=kind) if kind[0] != "_":
                names = (f"{kind}.{node.attr}",)
            case ast.Name(id=variable) if variable in CLASSES and not node.attr.startswith("__"):
                names = tuple(f"{kind}.{node.attr}" for kind in CLASSES[variable])
        if names:
            call = called.get(id(node))
            plain = call is not None and not any(isinstance(a, ast.Starred) for a in call.args)
            yield Use(names, len(call.args) if call and plain else None, node.lineno)


def overrides(source: str) -> Iterator[tuple[str, str, int, bool]]:
    """Methods of subclasses of TensorRT's: class, method, parameters without self, takes more."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.bases:
            base = ast.unparse(node.bases[0])
            for method in node.body if base.startswith("trt.") else ():
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    count = len(method.args.args) - 1
                    yield base[4:], method.name, count, method.args.vararg is not None


def missing(source: str, version: str) -> dict[str, int]:
    """Names of ours that this version lacks, with their lines."""
    table = TABLES[version]
    known = {*table, *(f"{kind}.{member}" for kind in table for member in table[kind])}
    known |= {f"{kind}.__init__" for kind in table}
    return {
        use.names[0]: use.line for use in uses(source) if not any(n in known for n in use.names)
    }


def fits(count: int, signatures: list[list[str]] | None) -> bool:
    """Whether so many arguments by position suit one of a callable's signatures."""
    return signatures is not None and any(
        sum(not name.endswith("=") for name in names) <= count <= len(names) for names in signatures
    )


def test_the_collector_sees_what_the_compiler_uses():
    found = {name for file in FILES for use in uses(file.read_text()) for name in use.names}
    assert {"Builder.create_network", "BuilderFlag.STRICT_NANS", "ITensor.get_dimension_name",
            "OnnxParser.parse_from_file", "IProgressMonitor", "Weights.nbytes",
            "IOptimizationProfile.set_shape"} <= found  # fmt: skip
    assert len(found) > 50


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists_in_tensorrt(version):
    lacking = {name for file in FILES for name in missing(file.read_text(), version)}
    assert lacking == ABSENT[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_has_as_many_arguments_as_tensorrt_takes(version):
    wrong, checked = [], 0
    for file in FILES:
        for use in uses(file.read_text()):
            for name in use.names:
                kind, _, member = name.partition(".")
                signatures = TABLES[version].get(kind, {}).get(member)
                if use.arguments is not None and signatures is not None:
                    checked += 1
                    if not fits(use.arguments, signatures):
                        wrong.append(f"{file.name}:{use.line}: {name}{signatures}")
    assert not wrong
    assert checked > 15


@pytest.mark.parametrize("version", VERSIONS)
def test_our_subclasses_take_what_tensorrt_passes(version):
    found = [method for file in FILES for method in overrides(file.read_text())]
    assert {kind for kind, *_ in found} == {"ILogger", "IProgressMonitor", "IStreamWriter"}
    for kind, name, count, takes_more in found:
        signatures = TABLES[version].get(kind, {}).get(name)
        if signatures is None:
            assert kind == "IStreamWriter"
            assert "IStreamWriter" in ABSENT[version]
            continue
        passed = {len(names) for names in signatures}
        assert count in passed or (takes_more and count <= min(passed)), f"{kind}.{name}"


def test_every_name_exists_in_tensorrt_rtx():
    trt = pytest.importorskip("tensorrt_rtx_bindings")

    def has(name: str) -> bool:
        kind, _, member = name.partition(".")
        return hasattr(trt, kind) and (not member or hasattr(getattr(trt, kind), member))

    lacking = [
        f"{file.name}:{use.line}: {use.names[0]}"
        for file in FILES
        for use in uses(file.read_text())
        if not any(map(has, use.names))
    ]
    assert not lacking


def test_nothing_that_version_11_removed_is_used_in_any_engine():
    found = [
        f"{file.name}: {hit[0]}"
        for file in sorted(ENGINES.glob("*.py"))
        for pattern in REMOVED
        for hit in re.finditer(pattern, file.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "config.set_flag(trt.BuilderFlag.FP16)",
        "builder.platform_has_fast_fp16",
        "parser.supports_model(data)",
        "network.add_quantized(1)",
        "trt.IAlgorithmSelector",
    ],
)
def test_a_removed_or_invented_name_is_noticed(line):
    assert missing(line, "11.4.0.106")


@pytest.mark.parametrize(
    "line",
    [
        "trt.BuilderFlag.FP16",
        "engine.device_memory_size",
        "1 << int(Flag.EXPLICIT_BATCH)",
        "engine.weight_streaming_budget = 1",
    ],
)
def test_a_removed_name_is_recognised_and_its_replacement_is_not(line):
    assert any(re.search(pattern, line) for pattern in REMOVED)
    replaced = line.replace("_size", "_size_v2").replace("_budget", "_budget_v2")
    if replaced != line:
        assert not any(re.search(pattern, replaced) for pattern in REMOVED)


def test_a_call_with_too_many_arguments_is_noticed():
    signatures = TABLES["11.4.0.106"]["IOptimizationProfile"]["set_shape"]
    assert fits(4, signatures)
    assert not fits(3, signatures)
    assert not fits(5, signatures)
