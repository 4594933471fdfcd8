from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moon.errors import UsageError
from moon.trainer.sparsity.budget import counts, densities, share_out
from moon.trainer.sparsity.structure import parse_structure
from moon.trainer.sparsity.topology import Layer, find_layers

TWO_FOUR = parse_structure("2:4")


def layer(name: str, *shape: int, dense: bool = False) -> Layer:
    return Layer(name=f"{name}.weight", weight=nn.Parameter(torch.empty(shape)), dense=dense)


def test_a_layer_above_its_bound_gets_the_bound_and_the_rest_is_solved_again() -> None:
    # Raw scores 8/16 = .5 and 40/400 = .1. A budget of 124.8 (.3 * 416): one eps for both,
    # 124.8 / (8 + 40) = 2.6, gives the small layer 1.3, above .5. It gets .5 * 16 = 8, the
    # other 116.8 of 400.
    layers = [layer("a", 4, 4), layer("b", 20, 20)]
    found = densities(layers, 0.3, "erk", TWO_FOUR)
    assert found == {"a.weight": 0.5, "b.weight": pytest.approx(116.8 / 400)}
    assert counts(layers, found, TWO_FOUR) == {"a.weight": 8, "b.weight": 117}


def test_bounds_meet_dense_layers() -> None:
    # Dense: 16. Of 124.8 are left 108.8, all to b.
    layers = [layer("a", 4, 4, dense=True), layer("b", 20, 20)]
    found = densities(layers, 0.3, "erk", TWO_FOUR)
    assert found == {"a.weight": 1.0, "b.weight": pytest.approx(108.8 / 400)}


def test_a_full_structure_fills_every_group_and_dense_layers_come_on_top() -> None:
    layers = [layer("stem", 4, 3, dense=True), layer("b", 20, 20), layer("c", 8, 16, 3, 3)]
    for distribution in ("uniform", "er", "erk"):
        assert share_out(layers, 0.5, distribution, TWO_FOUR) == {
            "stem.weight": 12,
            "b.weight": 200,
            "c.weight": 8 * 16 * 9 // 2,
        }
    with pytest.raises(UsageError, match=r"1 of 1 layers kept dense.* hold 1 of"):
        share_out([layer("a", 4, 4, dense=True)], 0.5, "erk", TWO_FOUR)


def test_the_last_connections_below_the_full_structure_are_a_total() -> None:
    layers = [layer("stem", 4, 3, dense=True), layer("b", 20, 20)]
    found = share_out(layers, 0.49, "erk", TWO_FOUR)
    assert found == {"stem.weight": 12, "b.weight": 190}  # .49 * 412 - 12


def test_a_density_above_the_structure_names_the_largest() -> None:
    layers = [layer("a", 4, 4), layer("b", 20, 20)]
    with pytest.raises(
        UsageError, match=r"0\.6 is above what .* 2:4 admits.* a sparsity of at least 0\.5\."
    ):
        share_out(layers, 0.6, "erk", TWO_FOUR)
    with pytest.raises(UsageError, match=r"density of at most 0\.5,"):
        share_out(layers, 1.0, "erk", TWO_FOUR)
    # 12 dense ones and half of 400, of 412.
    stem = [layer("stem", 4, 3, dense=True), layer("b", 20, 20)]
    with pytest.raises(UsageError, match=r"at most 0\.5145, a sparsity of at least 0\.4855\."):
        share_out(stem, 0.52, "erk", TWO_FOUR)
    assert share_out(stem, 0.5145, "erk", TWO_FOUR)["b.weight"] == 200
    for name in ("unstructured", "block4x1", "fan-in"):
        assert share_out(layers, 1.0, "erk", parse_structure(name))["b.weight"] == 400


def test_incomplete_windows_raise_the_bound() -> None:
    # Of 6 inputs 2 of 4 and 2 of 2 may live.
    layers = [layer("a", 5, 6)]
    assert share_out(layers, 0.66, "erk", TWO_FOUR) == {"a.weight": 20}
    assert share_out(layers, 0.5, "erk", TWO_FOUR) == {"a.weight": 15}


def test_layers_too_small_are_named_with_the_remedy() -> None:
    layers = [layer("conv1", 64, 3, 3, 3), layer("mid", 64, 64), layer("head", 3, 64)]
    with pytest.raises(UsageError) as caught:
        share_out(layers, 0.5, "erk", TWO_FOUR)
    assert str(caught.value) == (
        "the structure 2:4 does not fit: conv1 has 3 input channels, fewer than 4. "
        "Keep it dense: dense=['stem']."
    )
    with pytest.raises(UsageError, match=r"head has 3 output.*dense=\['head'\]"):
        share_out(layers, 0.5, "erk", parse_structure("block4x1"))
    with pytest.raises(UsageError, match=r"Keep them dense: dense=\['stem', 'b'\]"):
        share_out([layer("a", 4, 2), layer("b", 4, 3)], 0.5, "erk", TWO_FOUR)
    # Kept dense, or with nothing to be sparse, they fit.
    share_out([layer("a", 4, 2, dense=True), layers[1]], 0.3, "erk", TWO_FOUR)


@pytest.mark.parametrize("name", ["2:4", "block4x1", "fan-in"])
def test_transposed_convolutions_are_unstructured_or_dense(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3))
    share_out(find_layers(model), 0.5)
    with pytest.raises(UsageError, match=r"1 is a transposed convolution.*dense=\['1'\]"):
        share_out(find_layers(model), 0.3, "erk", parse_structure(name))
    share_out(find_layers(model, dense=("1",)), 0.7 if name != "2:4" else 0.5, "erk",
              parse_structure(name))  # fmt: skip


def test_grouped_convolutions_count_the_channels_of_a_group() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3, groups=8))
    with pytest.raises(UsageError, match="1 has 2 input channels, fewer than 4"):
        share_out(find_layers(model), 0.3, "erk", TWO_FOUR)
    with pytest.raises(UsageError, match="1 has groups of 2 output channels"):
        share_out(find_layers(model), 0.3, "erk", parse_structure("block4x1"))


@pytest.mark.parametrize(
    ("name", "least"), [("unstructured", 2), ("2:4", 2), ("block4x1", 8), ("fan-in", 30)]
)
def test_a_density_too_low_names_the_smallest(name: str, least: int) -> None:
    layers, structure = [layer("a", 10, 10), layer("b", 20, 20)], parse_structure(name)
    smallest = least / 500
    with pytest.raises(
        UsageError, match=rf"need at least {least} .*at least {smallest:g}, a sparsity of at most"
    ):
        share_out(layers, 0.9 * smallest, "erk", structure)
    assert sum(share_out(layers, smallest, "uniform", structure).values()) >= least


@given(
    st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.sampled_from(["uniform", "er", "erk"]),
    st.sampled_from(["2:4", "3:4", "1:3", "block4x1", "fan-in"]),
)
def test_any_structure_meets_the_total_under_its_bounds(
    shapes: list[tuple[int, int]], share: float, distribution: str, name: str
) -> None:
    structure = parse_structure(name)
    layers = [layer(str(i), *shape) for i, shape in enumerate(shapes)]
    total = sum(x.size for x in layers)
    most = sum(structure.limit(x.shape) * x.size for x in layers) / total
    density = share * most
    if density == structure.full:
        return
    found = densities(layers, density, distribution, structure)
    assert all(0 < found[x.name] <= structure.limit(x.shape) * (1 + 1e-9) for x in layers)
    assert sum(found[x.name] * x.size for x in layers) == pytest.approx(density * total)
    nonzeros = counts(layers, found, structure)
    assert all(nonzeros[x.name] <= round(structure.limit(x.shape) * x.size) for x in layers)
