"""fp16 overflow is found by running the graph, and the first layer named."""

import numpy as np
import pytest

from moon.errors import ParityError
from moon.export.trt.overflow import check_finite, first_overflow
from tests.export.trt.networks import model, node


def _network(scale: float) -> object:
    weight = np.full((4, 1, 3, 3), scale, np.float16)
    return model(
        [
            node("Cast", ["input"], "half", to=10),
            node("Conv", ["half", "w"], "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["conv"], "relu"),
            # What saturates hides an overflow from everything behind it.
            node("Sigmoid", ["relu"], "gate"),
            node("GlobalAveragePool", ["gate"], "pool"),
            node("Flatten", ["pool"], "flat"),
            node("Cast", ["flat"], "logits", to=1),
        ],
        {"w": weight},
    )


def test_the_first_layer_is_named() -> None:
    images = {"input": np.full((2, 1, 8, 8), 300, np.float32)}
    assert first_overflow(_network(100), images) == ("conv/Conv", "Conv")  # type: ignore[arg-type]
    with pytest.raises(ParityError, match=r"layer conv/Conv \(Conv\) gives values beyond 65504"):
        check_finite(_network(100), images)  # type: ignore[arg-type]


def test_one_image_of_several_is_enough() -> None:
    images = np.zeros((3, 1, 8, 8), np.float32)
    assert first_overflow(_network(100), {"input": images}) is None  # type: ignore[arg-type]
    images[2] = 300
    assert first_overflow(_network(100), {"input": images}) is not None  # type: ignore[arg-type]


def test_what_fits_passes() -> None:
    check_finite(_network(0.1), {"input": np.ones((1, 1, 8, 8), np.float32)})  # type: ignore[arg-type]
