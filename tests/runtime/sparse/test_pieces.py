"""How many images are run at a time."""

from __future__ import annotations

import pytest

from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.pieces import MOST
from tests.runtime.sparse.graphs import Graph


def images_together(side: int, channels: int, density: float) -> int:
    graph = Graph(channels, side, side)
    name = "x"
    for _ in range(3):
        weight = graph.weight(channels, channels, 3, 3, density=density)
        name = graph.add("Conv", name, weight, pads=[1] * 4)
    (part,) = SparseEngine(graph.data(), force=True)._parts
    most: int = part._most  # type: ignore[union-attr]
    return most


@pytest.mark.parametrize("side", [4, 8])
def test_small_planes_and_many_weights_are_run_together(side: int) -> None:
    assert images_together(side, 256, 0.3) >= 8


def test_large_planes_and_few_weights_are_run_one_by_one() -> None:
    assert images_together(96, 64, 0.02) == 1


def test_fewer_weights_are_never_shared_by_more_images() -> None:
    found = [images_together(16, 128, density) for density in (0.02, 0.1, 0.5)]
    assert found == sorted(found) and found[0] >= 1 and found[-1] <= MOST
