"""Engines of networks of the size people use, dense and 2:4, for every target."""

from pathlib import Path

import pytest

from moon.export import from_onnx
from moon.export.trt.request import EngineRequest
from moon.runtime.trt.package import RTX_TARGETS, installed
from moon.runtime.trt.stored import facts
from moon.runtime.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(installed("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"),
]


def _exported(name: str, path: Path, *, two_four: bool) -> Path:
    import onnx
    import torch
    import torchvision

    from moon.export.trace import trace

    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=10).eval()
    if two_four:
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, torch.nn.Conv2d) and layer.in_channels % 4 == 0:
                    grouped = layer.weight.view(layer.out_channels, -1, 4, *layer.kernel_size)
                    grouped[:, :, 2:] = 0
    onnx.save(trace(network, channels=3, size=(64, 64)), path)
    return path


@pytest.mark.parametrize(
    ("name", "two_four"), [("resnet18", False), ("resnet18", True), ("resnet50", False)]
)
def test_an_engine(name: str, two_four: bool, tmp_path: Path) -> None:
    model = _exported(name, tmp_path / f"{name}.onnx", two_four=two_four)
    bundle = from_onnx(
        model,
        tmp_path / "b",
        classes=[str(i) for i in range(10)],
        mean=[0.5],
        std=[0.25],
        trt=EngineRequest(targets=tuple(RTX_TARGETS)),
    )
    [fact] = facts(bundle)
    assert fact["targets"] == [f"sm_{sm}" for sm in sorted(RTX_TARGETS)]
    # In fp16 it takes half of the fp32 weights, and its kernels little.
    dense = 4 * sum(w for w in _weights(bundle))
    assert 0.45 * dense < fact["bytes"] < 0.75 * dense
    assert (len(fact["sparsity"]["eligible"]) > 15) == two_four
    assert fact["flags"] == (["SPARSE_WEIGHTS"] if two_four else [])
    assert all(check.ok for check in verify(bundle))


def _weights(bundle: object) -> list[int]:
    import math

    layers = bundle.manifest.sparsity.layers.values()  # type: ignore[attr-defined]
    return [math.prod(layer.shape) for layer in layers]
