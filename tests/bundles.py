"""Tiny real bundles for tests: a hand-made ONNX classifier with random weights and its gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moon.bundle import Bundle, gates_bytes, golden_bytes, write_bundle
from moon.data.preprocess import Preprocess
from moon.gate import Gate
from moon.gate_calibration import calibrate_conformal
from moon.onnxfile import patch_scalar, patch_vector
from moon.runtime.onnxruntime import OnnxRuntime
from moon.scores import ebo, msp, unknown_probability

CLASSES = ("cat", "dog", "bird")
_FILTERS = 8


def make_bundle(
    path: str | Path,
    *,
    classes: Sequence[str] = CLASSES,
    size: int = 8,
    channels: int = 1,
    calibrated: bool = True,
    unknown: bool = True,
    dtype: str = "float32",
    score: str = "ebo",
    reject: float = 0.05,
    sparsity: float = 0.8,
    seed: int = 0,
    force: bool = False,
    by_class: bool = True,
) -> Bundle:
    """Write a bundle: conv 3x3, ReLU, pool, linear, score head; random sparse weights.

    The gate, conformal, is calibrated on 300 random images like those of :func:`images`.
    ``by_class`` False makes the graph one of earlier releases, without a threshold a class.
    """
    manifest = manifest_fields(classes, size, channels, unknown, dtype)
    model = make_model(
        classes=len(classes), channels=channels, size=size, unknown=unknown, dtype=dtype,
        score=score, sparsity=sparsity, seed=seed, by_class=by_class,
    )  # fmt: skip
    manifest["sparsity"] = _sparsity(model)
    data = model.SerializeToString()
    preprocess = Preprocess.from_json(manifest["preprocess"])
    files = {}
    if calibrated:
        gate = _gate(data, preprocess, manifest["unknown_index"], dtype, score, reject, seed)
        data = patch_scalar(data, "threshold", gate.threshold)
        if by_class:
            bars = np.full(len(classes), gate.threshold, np.float32)
            data = patch_vector(data, "thresholds", bars)
        files["gate.json"] = gates_bytes({"default": gate})
    pixels = images(5, size, channels, seed=seed + 1)
    files["golden.npz"] = golden_bytes(pixels, _run(data, preprocess, dtype, pixels))
    files["model.onnx"] = data
    return write_bundle(path, manifest_fields=manifest, files=files, force=force)


def images(n: int, size: int = 8, channels: int = 1, *, seed: int = 0) -> NDArray[np.uint8]:
    """Random uint8 [n, size, size, channels], each of its own brightness and contrast."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(40, 210, (n, 1, 1, channels))
    spread = rng.uniform(5, 60, (n, 1, 1, 1))
    noise = rng.standard_normal((n, size, size, channels))
    return np.clip(level + spread * noise, 0, 255).astype(np.uint8)


def manifest_fields(
    classes: Sequence[str], size: int, channels: int, unknown: bool, dtype: str
) -> dict[str, Any]:
    """The manifest of such a bundle, but for its sparsity."""
    scores = ["msp", "ebo", "mls", *(["unknown"] if unknown else [])]
    return {
        "name": "tiny",
        "classes": list(classes),
        "unknown_index": len(classes) if unknown else None,
        "input": {
            "name": "input",
            "dtype": dtype,
            "layout": "NCHW" if dtype == "float32" else "NHWC",
            "size": [size, size],
        },
        "preprocess": {
            "resize": None,
            "crop": [size, size],
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
            "interpolation": "bilinear",
        },
        "outputs": ["label", "accept", "score", "logits", *(f"score_{s}" for s in scores)],
        "scores": scores,
        "provenance": {"made_by": "tests"},
    }


def make_model(
    *,
    classes: int,
    channels: int = 1,
    size: int = 8,
    unknown: bool = True,
    dtype: str = "float32",
    score: str = "ebo",
    sparsity: float = 0.8,
    seed: int = 0,
    by_class: bool = True,
) -> onnx.ModelProto:
    """An uncalibrated graph by the bundle's conventions."""
    rng = np.random.default_rng(seed)
    outputs = classes + unknown
    weights: dict[str, NDArray[Any]] = {
        "conv.weight": _sparse(rng, (_FILTERS, channels, 3, 3), 0.8, sparsity),
        "conv.bias": rng.normal(0, 0.3, _FILTERS).astype(np.float32),
        "fc.weight": _sparse(rng, (outputs, _FILTERS * 4), 1.2, sparsity),
        "fc.bias": rng.normal(0, 0.5, outputs).astype(np.float32),
        "threshold": np.array(np.inf, np.float32),
        "known": np.arange(classes),
        "one": np.array([1]),
    }
    scores = ["msp", "ebo", "mls", *(["unknown"] if unknown else [])]
    weights["gate_score"] = np.array(scores.index(score), np.int64)
    if by_class:
        weights["thresholds"] = np.full(classes, np.inf, np.float32)
    image = (["N", channels, size, size], TensorProto.FLOAT)
    nodes = []
    if dtype == "uint8":
        image = (["N", size, size, channels], TensorProto.UINT8)
        weights |= {"mean": np.float32([0.5]), "std": np.float32([0.25])}
        weights["full"] = np.array(255, np.float32)
        nodes = [
            helper.make_node("Cast", ["input"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Div", ["nchw", "full"], ["unit"]),
            helper.make_node("Sub", ["unit", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["image"]),
        ]
    nodes += _body("image" if dtype == "uint8" else "input", size) + _head(scores, by_class)
    result = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("accept", TensorProto.BOOL, ["N"]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", outputs]),
        *(helper.make_tensor_value_info(f"score_{s}", TensorProto.FLOAT, ["N"]) for s in scores),
    ]
    inputs = [
        helper.make_tensor_value_info("input", image[1], image[0]),
        helper.make_tensor_value_info("threshold", TensorProto.FLOAT, []),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, result, tensors)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="tests"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _body(image: str, size: int) -> list[onnx.NodeProto]:
    half = size // 2
    return [
        helper.make_node("Conv", [image, "conv.weight", "conv.bias"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node(
            "AveragePool", ["relu"], ["pool"], kernel_shape=[half, half], strides=[half, half]
        ),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]


def _head(scores: Sequence[str], by_class: bool) -> list[onnx.NodeProto]:
    nodes = [
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
        helper.make_node("Gather", ["logits", "known"], ["z_known"], axis=1),
        helper.make_node("Gather", ["p", "known"], ["p_known"], axis=1),
        helper.make_node("ArgMax", ["z_known"], ["label"], axis=1, keepdims=0),
        helper.make_node("ReduceMax", ["p_known", "one"], ["score_msp"], keepdims=0),
        helper.make_node("ReduceLogSumExp", ["z_known", "one"], ["score_ebo"], keepdims=0),
        helper.make_node("ReduceMax", ["z_known", "one"], ["score_mls"], keepdims=0),
    ]
    if "unknown" in scores:
        nodes += [
            helper.make_node("ReduceSum", ["p_known", "one"], ["p_sum"], keepdims=0),
            helper.make_node("Constant", [], ["unity"], value_float=1.0),
            helper.make_node("Sub", ["p_sum", "unity"], ["score_unknown"]),
        ]
    columns = [f"column_{name}" for name in scores]
    nodes += [
        helper.make_node("Unsqueeze", [f"score_{name}", "one"], [column])
        for name, column in zip(scores, columns, strict=True)
    ]
    gathered = [
        helper.make_node("Gather", ["thresholds", "label"], ["of_class"]),
        helper.make_node("IsNaN", ["threshold"], ["unset"]),
        helper.make_node("Where", ["unset", "of_class", "threshold"], ["bar"]),
    ]
    return [
        *nodes,
        *(gathered if by_class else []),
        helper.make_node("Concat", columns, ["stacked"], axis=1),
        helper.make_node("Gather", ["stacked", "gate_score"], ["score"], axis=1),
        helper.make_node(
            "GreaterOrEqual", ["score", "bar" if by_class else "threshold"], ["reaches"]
        ),
        helper.make_node("IsInf", ["score"], ["infinite"]),
        helper.make_node("Not", ["infinite"], ["finite"]),
        helper.make_node("And", ["reaches", "finite"], ["accept"]),
    ]


def _sparse(
    rng: np.random.Generator, shape: tuple[int, ...], scale: float, sparsity: float
) -> NDArray[np.float32]:
    values = rng.normal(0, scale, shape).astype(np.float32)
    values.flat[rng.permutation(values.size)[: round(sparsity * values.size)]] = 0
    return values


def _sparsity(model: onnx.ModelProto) -> dict[str, Any]:
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name.endswith(".weight")
    }
    layers = {
        name: {
            "shape": list(value.shape),
            "nonzeros": int(np.count_nonzero(value)),
            "density": np.count_nonzero(value) / value.size,
        }
        for name, value in found.items()
    }
    kept = sum(layer["nonzeros"] for layer in layers.values())
    total = sum(value.size for value in found.values())
    return {"global": 1 - kept / total, "layers": layers, "pattern": "unstructured"}


def _run(
    model: bytes, preprocess: Preprocess, dtype: str, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    batch = pixels if dtype == "uint8" else preprocess.normalise(pixels)
    return OnnxRuntime(model).run(batch)


def _gate(
    model: bytes,
    preprocess: Preprocess,
    unknown_index: int | None,
    dtype: str,
    score: str,
    reject: float,
    seed: int,
) -> Gate:
    pixels = images(300, preprocess.crop[0], preprocess.channels, seed=seed + 2)
    outputs = _run(model, preprocess, dtype, pixels)
    logits = outputs["logits"]
    reason = {
        "msp": float(np.quantile(msp(logits, unknown_index), 0.05)),
        "ebo": float(np.quantile(ebo(logits, unknown_index), 0.05)),
    }
    if unknown_index is not None:
        p_unknown = unknown_probability(logits, unknown_index)
        reason["p_unknown"] = float(np.quantile(p_unknown, 0.95))
    return calibrate_conformal(
        outputs[f"score_{score}"], reject, score=score, evidence={"reason": reason}
    )
