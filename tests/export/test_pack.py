from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.errors import ExportError, ParityError, UsageError
from moon.export.checks import check_onnx, check_packed
from moon.export.codec import KINDS, encode
from moon.export.graph import array, initializers, set_initializer, weight_names
from moon.export.half import to_half
from moon.export.head import add_head
from moon.export.pack import pack, round_values
from moon.export.session import run
from moon.export.trace import trace
from moon.export.unpacking import compact, coordinates, narrow, plain
from moon.trainer.models import build
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import find_layers, generator, random_mask

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((7, 3, 8, 8)).astype(np.float32)


def sparse(shape: tuple[int, ...], density: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(len(shape) + int(1000 * density))
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) > density] = 0
    return weight


def network() -> ModelProto:
    """One layer of every kind: stem dense, gaps, bitmask with odd size, all zero, head dense."""
    tensors: dict[str, NDArray[Any]] = {
        "stem": sparse((16, 3, 3, 3), 1.0),
        "gaps": sparse((64, 16, 3, 3), 0.02),
        "mask": sparse((33, 64, 3, 3), 0.3),
        "none": np.zeros((33, 33, 3, 3), np.float32),
        "fc": sparse((5, 33), 0.5),
        "axes": np.array([2, 3]),
    }
    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["a"], **same),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "gaps"], ["c"], **same),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "mask"], ["e"], **same),
        helper.make_node("Conv", ["e", "none"], ["f"], **same),
        helper.make_node("Add", ["e", "f"], ["g"]),
        helper.make_node("ReduceMean", ["g", "axes"], ["h"], keepdims=0),
        helper.make_node("Gemm", ["h", "fc"], ["logits"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def operators(model: ModelProto, folder: Path, level: str) -> Counter[str]:
    """What ONNX Runtime is left with after optimising while it loads."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(folder / "optimised.onnx")
    return Counter(node.op_type for node in optimised.graph.node)


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("weights", ["dense", "compact", "coo"])
def test_outputs_and_weights_are_bit_equal(weights: Any, values: Any) -> None:
    model = network()
    rounded = round_values(model, values)
    packed = pack(model, weights=weights, values=values)
    check_packed(packed, rounded)
    check_onnx(packed, full=weights != "coo")
    expected, got = (run(m, {"input": IMAGES})["logits"] for m in (rounded, packed))
    assert got.tobytes() == expected.tobytes()
    assert packed.ByteSize() <= model.ByteSize() + 1000


def test_a_layer_takes_the_form_that_suits_its_density() -> None:
    packed = pack(network(), weights="compact")
    held = initializers(packed)
    assert {"stem", "fc", "gaps/gaps", "mask/bitmask", "none/gaps"} <= set(held)
    assert not {"gaps", "mask", "none"} & set(held)


def one_layer(weight: NDArray[Any]) -> ModelProto:
    rows, channels = weight.shape[:2]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w"], ["logits"])],
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", channels, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", rows, None, None])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


SIDES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=30)
@given(SIDES, st.sampled_from([0, 0.001, 0.03, 0.1, 0.125, 0.2, 0.5, 0.9, 1]), st.booleans())
@example((1, 1, 1, 1), 0.0, False)
@example((1, 1, 1, 1), 1.0, True)
@example((64, 64, 3, 3), 0.125, False)
@example((64, 64, 3, 3), 0.12, True)
def test_every_layer_takes_the_fewest_bytes_and_comes_back(
    shape: tuple[int, ...], density: float, half: bool
) -> None:
    model = one_layer(sparse(shape, density))
    values: Any = "fp16" if half else "fp32"
    chosen = pack(model, values=values)
    forms = [pack(model, values=values, kinds=kinds) for kinds in ((), ("gaps",), ("bitmask",))]
    # Constants that all layers share belong to none.
    shared = 200
    assert chosen.ByteSize() <= min(form.ByteSize() for form in forms) + shared
    for packed in (chosen, *forms):
        check_packed(packed, round_values(model, values))


def test_bytes_of_parts_are_those_in_the_file() -> None:
    weight = sparse((64, 16, 3, 3), 0.1)
    for parts in (
        plain("w", weight),
        narrow("w", weight.astype(np.float16), weight.dtype),
        coordinates("w", weight, weight.dtype),
        *(compact("w", encode(weight, kind), weight.dtype) for kind in KINDS),
    ):
        graph = onnx.GraphProto(node=parts.nodes, initializer=parts.tensors)
        graph.sparse_initializer.extend(parts.sparse)
        assert parts.nbytes == graph.ByteSize()


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_runtime_folds_the_decoding_away(tmp_path: Path, precision: str, level: str) -> None:
    model = network()
    if precision == "fp16":
        model = to_half(round_values(model, "fp16"))
    plain = operators(model, tmp_path, level)
    packed = pack(model, weights="compact", values="fp16" if precision == "fp16" else "fp32")
    assert operators(packed, tmp_path, level) == plain


def test_packing_leaves_the_model_it_was_given_alone() -> None:
    model = network()
    before = model.SerializeToString()
    pack(model, weights="compact", values="fp16")
    assert model.SerializeToString() == before


def test_the_same_model_gives_the_same_bytes() -> None:
    one, other = (pack(network(), weights="compact").SerializeToString() for _ in range(2))
    assert one == other


def test_a_weight_too_large_for_fp16_is_refused() -> None:
    model = network()
    weight = array(initializers(model)["gaps"])
    weight.flat[0] = 70000
    set_initializer(model, "gaps", weight)
    with pytest.raises(ExportError, match=r"weight gaps holds 7e\+04, which fp16 cannot"):
        pack(model, values="fp16")


def test_a_changed_weight_is_noticed() -> None:
    model = network()
    packed = pack(model, weights="compact")
    gaps = array(initializers(packed)["gaps/gaps"])
    gaps[3] += 1
    set_initializer(packed, "gaps/gaps", gaps)
    with pytest.raises(ParityError, match=r"packing changed \d+ of 9216 weights of gaps"):
        check_packed(packed, model)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UsageError, match="weights 'zip' is none of dense, compact, coo"):
        pack(network(), weights="zip")  # type: ignore[arg-type]


def test_resnet18_at_95_percent_keeps_its_promised_size(tmp_path: Path) -> None:
    net = build("resnet18", outputs=11, channels=3, size=(32, 32))
    layers = find_layers(net)
    kept = counts(layers, densities(layers, 0.05))
    with torch.no_grad():
        for layer in layers:
            draw = generator(0, 0, layer.name)
            layer.weight.mul_(random_mask(layer.weight, kept[layer.name], draw))
    body = trace(net, channels=3, size=(32, 32))
    model = add_head(body, outputs=11, unknown_index=10)
    assert len(weight_names(model)) == len(layers) == 21
    images = RNG.standard_normal((3, 3, 32, 32)).astype(np.float32)
    for values, limit in (("fp32", 0.065), ("fp16", 0.039)):
        rounded = round_values(model, values)  # type: ignore[arg-type]
        packed = pack(model, weights="compact", values=values)  # type: ignore[arg-type]
        assert packed.ByteSize() <= limit * model.ByteSize()
        check_onnx(packed)
        expected, got = (run(m, {"input": images}) for m in (rounded, packed))
        for name, value in expected.items():
            assert got[name].tobytes() == value.tobytes(), name
