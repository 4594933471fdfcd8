"""The real TensorRT-RTX builds on this machine, whatever GPU it has or has not."""

import numpy as np
import pytest

from moon.errors import ExportError, UsageError
from moon.export.trt.builder import build
from moon.runtime.trt.api import Api, load
from moon.runtime.trt.sidecar import Profile
from tests.export.trt.networks import model, node, two_four

ONE = Profile(min=1, opt=2, max=4)


@pytest.fixture(scope="module")
def api() -> Api:
    pytest.importorskip("tensorrt_rtx")
    return load("tensorrt_rtx")


def _conv(channels: int = 8, dtype: type = np.float16) -> bytes:
    rng = np.random.default_rng(0)
    constants = {
        "w0": rng.standard_normal((channels, 1, 3, 3)).astype(dtype),
        "w1": two_four(4, channels).astype(dtype),
    }
    nodes = [
        node("Cast", ["input"], "half", to=10 if dtype is np.float16 else 1),
        node("Conv", ["half", "w0"], "a", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "w1"], "c", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c"], "d"),
        node("Flatten", ["d"], "e"),
        node("Cast", ["e"], "logits", to=1),
    ]
    return model(nodes, constants).SerializeToString()


def test_an_engine_for_every_target(api: Api) -> None:
    engine = build(api, _conv(), profile=ONE, targets=api.targets, sparse=True)
    assert engine.flags == ("SPARSE_WEIGHTS",)
    assert engine.inputs["input"].shape == (-1, 1, 8, 8)
    assert engine.outputs["logits"].dtype == "float32" and engine.seconds > 0
    validity = api.check(engine.data)
    assert validity.ok, validity.why
    assert len(engine.data) > 1000


def test_an_engine_of_another_version_is_named(api: Api) -> None:
    data = bytearray(build(api, _conv(), profile=ONE, targets=(86,), sparse=False).data)
    # Where version 1.7 keeps its own number; a release that moves it fails here, and not silently.
    version = bytes(int(part) for part in api.version.split("."))
    assert bytes(data[24:28]) == version
    data[25] += 1
    validity = api.check(bytes(data))
    assert not validity.ok
    assert f"built by version {data[24]}.{data[25]}.{data[26]}" in validity.why


def test_an_operator_that_is_not_supported_is_named_with_its_node(api: Api) -> None:
    nodes = [node("Flatten", ["input"], "flat"), node("Det", ["square"], "det")]
    nodes.insert(1, node("Reshape", ["flat", "shape"], "square"))
    graph = model(nodes, {"shape": np.array([-1, 8, 8])}, "det", result=("N",))
    with pytest.raises(ExportError, match=r"does not support the operator Det of the node det/Det"):
        build(api, graph.SerializeToString(), profile=ONE, targets=(86,), sparse=False)


def test_what_is_no_graph(api: Api) -> None:
    with pytest.raises(ExportError, match="TensorRT"):
        build(api, b"not onnx", profile=ONE, targets=(86,), sparse=False)


def test_a_target_that_the_version_does_not_know(api: Api) -> None:
    with pytest.raises(UsageError, match=r"does not build for sm_90, only for sm_75"):
        build(api, _conv(), profile=ONE, targets=(90,), sparse=False)


def test_a_product_that_turing_lacks_is_named(api: Api) -> None:
    nodes = [
        node("Flatten", ["input"], "flat"),
        node("Transpose", ["flat"], "turned", perm=[1, 0]),
        node("MatMul", ["flat", "turned"], "logits"),
    ]
    graph = model(nodes, {}, result=("N", "N"))
    with pytest.raises(ExportError, match=r"cannot build the layer .* for sm_75.*Leave sm_75 out"):
        build(api, graph.SerializeToString(), profile=ONE, targets=(75,), sparse=False)
