"""The engine inspector's JSON, in both of its documented forms."""

from __future__ import annotations

import json

import pytest

from gentron.engines.trt_inspect import check_kernels, read_inspection
from gentron.errors import BackendError

OLD = {
    "Layers": [
        {
            "Name": "__myl_Fc_myl0_1",
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Dimensions": [2, 64], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "b", "Dimensions": [2, 64], "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_gemm_f16f16_f16f32",
            "Metadata": "[ONNX Layer: node_linear]",
        },
        {
            "Name": "_gemm_mha_v2_myl0_2",
            "LayerType": "kgen",
            "Inputs": [],
            "Outputs": [{"Name": "c", "Dimensions": [2], "Format/Datatype": "Half"}],
            "TacticName": "_gemm_mha_v2_0x7f",
        },
    ],
    "Bindings": ["a", "c"],
}
NEW = {
    "Layers": [
        {
            "Name": "attention_1",
            "LayerType": "kgen",
            "Outputs": [{"Name": "c", "Format": "Row major", "Datatype": "Float"}],
            "TacticName": "fmha_v2_flash_attention_fp16",
        },
        {"Name": "signal", "LayerType": "signal", "Outputs": []},
    ],
    "I/O Tensors": [],
}


def test_layers_types_and_fused_attention_are_counted():
    facts = read_inspection(json.dumps(OLD), "denoiser")
    assert facts == {
        "layers": 2,
        "layer_kinds": {"gemm": 1, "kgen": 1},
        "output_types": {"Half": 2},
        "fused_attention": {"layers": 1, "first": ["_gemm_mha_v2_myl0_2"]},
    }


def test_the_form_of_version_11_is_read_too():
    facts = read_inspection(json.dumps(NEW), "denoiser")
    assert facts["output_types"] == {"Float": 1, "unknown": 1}
    assert facts["fused_attention"]["layers"] == 1


def test_an_engine_built_without_details_has_names_only():
    facts = read_inspection(json.dumps({"Layers": ["_gemm_mha_v2_1", "relu"]}), "denoiser")
    assert (facts["layers"], facts["fused_attention"]["layers"]) == (2, 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": [1]}', '{"Layers": [{}]}'])
def test_another_form_is_an_error_that_says_so(text):
    with pytest.raises(BackendError, match="denoiser: the engine inspector's answer"):
        read_inspection(text, "denoiser")


@pytest.mark.parametrize("name", ["Half", "Row major linear FP16 format", "fp16"])
def test_a_kernel_in_the_type_asked_for_is_enough(name):
    check_kernels({"output_types": {"Float": 90, name: 1}}, "fp16", "denoiser")


@pytest.mark.parametrize("types", [{}, {"unknown": 3}])
def test_types_that_nobody_knows_are_no_error(types):
    check_kernels({"output_types": types}, "fp16", "denoiser")
    check_kernels({"unknown": "form"}, "fp16", "denoiser")


@pytest.mark.parametrize(("precision", "name"), [("fp16", "BFloat16"), ("bf16", "Half")])
def test_an_engine_without_such_a_kernel_is_refused(precision, name):
    facts = {"output_types": {"Float": 90, name: 2, "unknown": 4}}
    with pytest.raises(BackendError, match=f"{precision} was asked for.*90 Float, 2 {name}"):
        check_kernels(facts, precision, "denoiser")
    check_kernels(facts, "fp32", "denoiser")
