"""By hand: multiply-adds, and from which share and size on a model is worth it."""

from __future__ import annotations

import numpy as np
import pytest

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.steps import Rows
from moon.runtime.sparse.worth import LEAST_SAVED, MOST_LEFT, SAVED_EACH, Effort, pays, shortfall

from .graphs import Graph, lowered


def test_multiply_adds_of_one_image() -> None:
    graph = Graph(2, 6, 6)
    kernel = np.zeros((3, 1, 3, 3))
    kernel[0, 0, 1, 1] = kernel[2, 0, 0, :2] = 1
    kernel = np.concatenate([kernel, np.ones((1, 1, 3, 3))])
    y = graph.add("Conv", "x", graph.constant(kernel), group=2, strides=[2, 2], pads=[1] * 4)
    y = graph.add("Flatten", y)
    matrix = np.zeros((5, 36))
    matrix[1, :4] = 2
    graph.add("Gemm", y, graph.constant(matrix), transB=1)
    for images in (1, 7):
        found = lowered(graph, images=images)
        effort = Effort.of(found.steps, found.tensors)
        assert effort == Effort(dense=9 * 36 + 180, left=9 * 12 + 4)
        assert effort.saved == 9 * 24 + 176


def test_efforts_add_up() -> None:
    assert Effort(10, 4) + Effort(5, 5) == Effort(15, 9)


@pytest.mark.parametrize(
    ("dense", "left", "why"),
    [
        (0, 0, "no convolution"),
        (10**9, 10**9, "100% of its multiply-adds are left"),
        (10**9, int(MOST_LEFT * 10**9) + 10**7, "81% of its multiply-adds are left"),
        (10**9, int(MOST_LEFT * 10**9), ""),
        (10**9, 0, ""),
        (2 * LEAST_SAVED, LEAST_SAVED, ""),
        (2 * LEAST_SAVED, LEAST_SAVED + 1, f"saves only {LEAST_SAVED - 1:,} multiply-adds"),
    ],
)
def test_what_is_left_to_onnx_runtime(dense: int, left: int, why: str) -> None:
    found = shortfall(Effort(dense, left))
    assert (why in found) if why else found == ""


def test_a_part_pays_for_what_crosses() -> None:
    crossing = [Planes(3, 5, 4, 4), Rows(5, 2)]  # 48 and 2 numbers an image
    assert pays(Effort(100 + 50 * SAVED_EACH, 100), crossing)
    assert not pays(Effort(99 + 50 * SAVED_EACH, 100), crossing)
