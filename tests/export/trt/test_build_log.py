"""What the builder says of sparse layers, as versions of TensorRT word it."""

import re

import pytest

from moon.export.trt.build_log import (
    build_error,
    eligible_layers,
    picked_layers,
    sparse_tactics,
)
from moon.runtime.trt.log import Message


def _said(*texts: str) -> list[Message]:
    return [Message("info", text) for text in ("Detected 1 inputs", *texts)]


@pytest.mark.parametrize(
    ("eligible", "picked"),
    [
        (
            "(Sparsity) Layers eligible for sparse math: conv1, conv2, conv3",
            "(Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3",
        ),
        (
            "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: conv1, conv2, conv3",
            "(Sparsity) Chose 2 layer(s) using sparse tactics: conv2, conv3",
        ),
    ],
)
def test_both_wordings(eligible: str, picked: str) -> None:
    messages = _said(eligible, picked)
    assert eligible_layers(messages) == ("conv1", "conv2", "conv3")
    assert picked_layers(messages) == ("conv2", "conv3")


def test_none_picked_is_not_silence() -> None:
    messages = _said("(Sparsity) Chose 0 layer(s) using sparse tactics:")
    assert picked_layers(messages) == () and eligible_layers(messages) is None
    assert picked_layers(_said()) is None


def test_kernels_by_name() -> None:
    layers = [
        {"Name": "conv1", "TacticName": "sm80_xmma_fprop_sparse_conv_f16f16"},
        {"Name": "conv2", "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16"},
        {"Name": "shuffle"},
    ]
    assert sparse_tactics(layers) == ("conv1",)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("Error Code 2: Out of memory (no further information)", "ran out of memory.*--trt-batch"),
        (
            "Myelin (Cannot compile operation 'q/MatMul' for Turing (SM75): FP32 GEMM is not "
            "supported. In compileGraph at /_src/a.cpp:1)",
            "layer q/MatMul for sm_75.*Leave sm_75 out",
        ),
        ("something else", "could not build the engine: something else"),
    ],
)
def test_errors_in_a_line(said: str, text: str) -> None:
    error = build_error("TensorRT 11", [Message("error", said)])
    assert re.search(text, str(error))
