from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from moon.errors import BundleError
from moon.export.codec import encode
from moon.export.layer_bytes import file_bytes
from moon.export.pack import pack
from moon.export.unpacking import compact
from tests.export.test_pack import network, sparse


def forms(model: Any) -> dict[str, tuple[str, str]]:
    return {
        one.name: (one.form, one.values) for one in file_bytes(model.SerializeToString()).layers
    }


def test_the_form_of_each_layer_is_read_off_the_graph() -> None:
    dense, narrow = ("dense", "fp32"), ("dense", "fp16")
    plain = network()
    assert set(forms(plain).values()) == {dense}
    found = forms(pack(plain, weights="compact"))
    assert found == {
        "stem": dense, "gaps": ("deltas", "fp32"), "mask": ("bitmask", "fp32"),
        "none": ("deltas", "fp32"), "fc": dense,
    }  # fmt: skip
    found = forms(pack(plain, weights="compact", values="fp16"))
    assert found["stem"] == narrow and found["gaps"] == ("deltas", "fp16")
    assert found["mask"] == ("bitmask", "fp16")
    assert forms(pack(plain, weights="coo"))["gaps"] == ("coo", "fp32")
    assert forms(pack(plain, weights="coo", values="fp16"))["gaps"] == ("coo", "fp16")


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("weights", ["dense", "compact", "coo"])
def test_every_byte_of_the_file_is_counted_once(weights: Any, values: Any) -> None:
    packed = pack(network(), weights=weights, values=values)
    found = file_bytes(packed.SerializeToString())
    parts = sum(layer.file_bytes for layer in found.layers) + found.score_bytes + found.rest_bytes
    assert parts == found.file_bytes == packed.ByteSize()
    # What is left is the operators of the network and its names: it does not grow with weights.
    assert 0 < found.rest_bytes < 1500
    plain = network().ByteSize()
    assert found.dense_bytes == pytest.approx(plain, abs=1000)
    for layer in found.layers:
        assert layer.value_bytes + layer.index_bytes < layer.file_bytes
        assert layer.file_bytes < layer.value_bytes + layer.index_bytes + 1100


def test_a_layer_takes_what_packing_counted() -> None:
    packed = pack(network(), weights="compact")
    layer = next(one for one in file_bytes(packed.SerializeToString()).layers if one.name == "gaps")
    weight = sparse((64, 16, 3, 3), 0.02)
    encoded = encode(weight, "gaps")
    assert layer.file_bytes == compact("gaps", encoded, weight.dtype).nbytes
    assert layer.index_bytes == encoded.where.nbytes
    assert layer.value_bytes == encoded.values.nbytes
    assert layer.nonzeros == np.count_nonzero(weight) and layer.shape == weight.shape
    assert layer.dense_bytes == weight.nbytes


def test_constants_of_scores_are_told_apart() -> None:
    model = network()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(500, np.float32), "head/knn/b"))
    model.graph.node.append(helper.make_node("Add", ["logits", "head/knn/b"], ["score"]))
    found = file_bytes(model.SerializeToString())
    assert 2000 < found.score_bytes < 2030


def test_quantised_weights_of_other_tools_are_counted() -> None:
    """Integers with a scale, as quantisers write them."""
    model = network()
    del model.graph.initializer[[one.name for one in model.graph.initializer].index("mask")]
    whole = np.ones((33, 64, 3, 3), np.int8)
    model.graph.initializer.append(numpy_helper.from_array(whole, "mask/whole"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "mask/scale"))
    node = helper.make_node("DequantizeLinear", ["mask/whole", "mask/scale"], ["mask"])
    model.graph.node.insert(0, node)
    layers = file_bytes(model.SerializeToString()).layers
    layer = next(one for one in layers if one.name == "mask/whole")
    assert (layer.form, layer.values) == ("dense", "int8")
    assert whole.nbytes < layer.file_bytes < whole.nbytes + 200


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="not an ONNX file"):
        file_bytes(b"\xff\xff")
