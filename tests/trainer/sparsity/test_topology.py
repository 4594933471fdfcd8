from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

from moon.errors import UsageError
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import (
    Layer,
    find_layers,
    generator,
    magnitude_mask,
    random_mask,
    unwrap,
)

Shape = tuple[int, ...]


def resnet18_shapes(classes: int) -> list[Shape]:
    """Weights of a ResNet-18 with a 3x3 stem, written from its published table."""
    shapes: list[Shape] = [(64, 3, 3, 3)]
    width = 64
    for out in (64, 128, 256, 512):
        shapes += [(out, width, 3, 3), (out, out, 3, 3)]
        shapes += [(out, width, 1, 1)] if out != width else []
        shapes += [(out, out, 3, 3), (out, out, 3, 3)]
        width = out
    return [*shapes, (classes, 512)]


def resnet50_shapes(classes: int = 1000) -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(planes, width, 1, 1), (planes, planes, 3, 3), (planes * 4, planes, 1, 1)]
            shapes += [(planes * 4, width, 1, 1)] if block == 0 else []
            width = planes * 4
    return [*shapes, (classes, 2048)]


def bisected(shapes: Sequence[Shape], density: float, kernel: bool = True) -> list[float]:
    """min(1, eps * raw) with eps found by bisection: another way to the same densities."""
    sizes = [math.prod(shape) for shape in shapes]
    dims = [shape if kernel else shape[:2] for shape in shapes]
    raw = [sum(d) / math.prod(d) for d in dims]
    low, high = 0.0, 1e9
    for _ in range(400):
        eps = (low + high) / 2
        total = sum(min(1.0, eps * r) * n for r, n in zip(raw, sizes, strict=True))
        low, high = (eps, high) if total < density * sum(sizes) else (low, eps)
    return [min(1.0, low * r) for r in raw]


def small_stem() -> nn.Module:
    model = resnet18(num_classes=11)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("depth", [18, 50])
def test_erk_is_golden_for_resnets(depth: int, density: float) -> None:
    model, shapes = (
        (small_stem(), resnet18_shapes(11)) if depth == 18 else (resnet50(), resnet50_shapes())
    )
    layers = find_layers(model)
    assert sorted(layer.shape for layer in layers) == sorted(shapes)
    found = densities(layers, density, "erk")
    golden = dict(zip(shapes, bisected(shapes, density), strict=True))
    for layer in layers:
        assert found[layer.name] == pytest.approx(golden[layer.shape], rel=1e-9)
    nonzeros = sum(counts(layers, found).values())
    total = sum(layer.size for layer in layers)
    assert abs(nonzeros - density * total) <= len(layers)


def test_erk_of_resnets_in_figures() -> None:
    # Solved apart from the package, by bisection over the published layer tables.
    found = densities(find_layers(resnet50()), 0.1, "erk")
    assert {name: round(found[name], 4) for name in found if name in GOLDEN_50} == GOLDEN_50
    found = densities(find_layers(small_stem()), 0.05, "erk")
    assert {name: round(found[name], 4) for name in found if name in GOLDEN_18} == GOLDEN_18


GOLDEN_50 = {
    "conv1.weight": 0.4200,
    "layer1.0.conv1.weight": 1.0,
    "layer1.0.conv2.weight": 0.1773,
    "layer1.0.conv3.weight": 0.9588,
    "layer4.0.conv3.weight": 0.1192,
    "layer4.2.conv2.weight": 0.0213,
    "fc.weight": 0.0726,
}
GOLDEN_18 = {
    "conv1.weight": 1.0,
    "layer1.0.conv1.weight": 0.2325,
    "layer2.0.conv1.weight": 0.1718,
    "layer3.0.downsample.0.weight": 0.7535,
    "layer4.1.conv2.weight": 0.0279,
    "fc.weight": 1.0,
}


def test_layers_that_saturate_are_solved_again_by_hand() -> None:
    # raw scores 4/4 = 1 and 200/10000 = .02; budget .05 * 10004 = 500.2.
    # One eps for both gives 2.45 > 1 for the first, so it is full and the rest has 496.2.
    layers = [_layer("a", (2, 2)), _layer("b", (100, 100))]
    found = densities(layers, 0.05, "erk")
    assert found == {"a": 1.0, "b": pytest.approx(496.2 / 10000)}


def test_er_leaves_kernel_dimensions_out() -> None:
    shapes = resnet18_shapes(11)
    layers = [_layer(str(i), shape) for i, shape in enumerate(shapes)]
    er = list(densities(layers, 0.1, "er").values())
    assert er == pytest.approx(bisected(shapes, 0.1, kernel=False))
    assert er != pytest.approx(bisected(shapes, 0.1, kernel=True))


def test_dense_layers_count_toward_the_total() -> None:
    layers = find_layers(small_stem(), dense=("stem", "head"))
    found = densities(layers, 0.1, "uniform")
    total = sum(layer.size for layer in layers)
    kept = sum(found[layer.name] * layer.size for layer in layers)
    assert found["conv1.weight"] == found["fc.weight"] == 1.0
    assert kept == pytest.approx(0.1 * total)
    assert len(set(found.values())) == 2


def test_dense_layers_above_the_budget_are_refused() -> None:
    layers = [_layer("a", (10, 10), dense=True), _layer("b", (10, 10))]
    with pytest.raises(
        UsageError, match=r"hold 0\.5 of the weights, and the density is 0\.5\..*at least 0\.505,"
    ):
        densities(layers, 0.5, "erk")


@pytest.mark.parametrize(
    "density", [0.0, -0.0, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None]
)
def test_density_out_of_range(density: Any) -> None:
    with pytest.raises(UsageError, match="density must be above 0 and at most 1"):
        densities([_layer("a", (2, 2))], density)


def test_unknown_distribution() -> None:
    with pytest.raises(UsageError, match=r"unknown distribution 'erq'.*uniform, er, erk"):
        densities([_layer("a", (2, 2))], 0.5, "erq")


def test_only_conv_and_linear_weights_are_listed() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    assert [layer.name for layer in find_layers(model)] == ["0.weight", "4.weight"]


def test_shared_weights_are_listed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert [layer.name for layer in find_layers(model)] == ["0.weight"]


def test_depthwise_convolutions_are_dense_by_default() -> None:
    model = mobilenet_v2()
    depthwise = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    assert {layer.name for layer in find_layers(model) if layer.dense} == depthwise
    assert not any(layer.dense for layer in find_layers(model, sparse_depthwise=True))
    found = densities(find_layers(model), 0.1, "erk")
    assert all(found[name] == 1.0 for name in depthwise)


def test_stem_and_head_and_names() -> None:
    model = small_stem()
    dense = ("stem", "head", "layer1.0.conv1", "layer2.0.conv1.weight")
    found = [layer.name for layer in find_layers(model, dense=dense) if layer.dense]
    assert found == [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer2.0.conv1.weight",
        "fc.weight",
    ]


def test_unknown_dense_layer_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'conv11'.*'conv1'"):
        find_layers(small_stem(), dense=("conv11",))
    with pytest.raises(UsageError, match="must be a list"):
        find_layers(small_stem(), dense="stem")


def test_models_that_cannot_be_masked_are_refused() -> None:
    with pytest.raises(UsageError, match="has no Conv or Linear layer"):
        find_layers(nn.ReLU())
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UsageError, match="has no shape yet"):
        find_layers(lazy)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(UsageError, match="parametrization"):
        find_layers(normed)
    with pytest.raises(UsageError, match=r"weight is on the meta device\. Give the layer"):
        find_layers(nn.Linear(3, 3, device="meta"))
    empty = nn.Linear(3, 3)
    empty.weight = nn.Parameter(torch.empty(3, 0))
    with pytest.raises(UsageError, match="weight has no elements"):
        find_layers(empty)


def test_names_are_those_inside_the_wrappers() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    wrapped = nn.DataParallel(torch.compile(model))
    assert unwrap(wrapped) is model
    assert [layer.name for layer in find_layers(wrapped)] == ["0.weight"]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.floats(0.01, 1.0),
    st.sampled_from(["uniform", "er", "erk"]),
)
def test_any_distribution_meets_the_total(
    shapes: list[Shape], density: float, distribution: str
) -> None:
    layers = [_layer(str(i), shape) for i, shape in enumerate(shapes)]
    found = densities(layers, density, distribution)
    total = sum(layer.size for layer in layers)
    assert all(0 < value <= 1 for value in found.values())
    assert sum(found[x.name] * x.size for x in layers) == pytest.approx(density * total)
    nonzeros = counts(layers, found)
    assert abs(sum(nonzeros.values()) - density * total) <= len(layers)
    assert all(1 <= nonzeros[x.name] <= x.size for x in layers)


@given(st.integers(1, 500), st.data())
def test_random_masks_are_exact(size: int, data: st.DataObject) -> None:
    nonzeros = data.draw(st.integers(0, size))
    mask = random_mask(torch.empty(size, 1), nonzeros, generator(3, 0, "a"))
    assert mask.dtype is torch.bool and int(mask.sum()) == nonzeros


def test_random_masks_depend_on_seed_step_and_layer_alone() -> None:
    weight = torch.empty(50, 20)

    def draw(seed: int, step: int, layer: str) -> torch.Tensor:
        return random_mask(weight, 300, generator(seed, step, layer))

    first = draw(0, 0, "a")
    torch.rand(7)
    assert torch.equal(first, draw(0, 0, "a"))
    for other in (draw(1, 0, "a"), draw(0, 1, "a"), draw(0, 0, "b")):
        assert not torch.equal(first, other)


def test_random_masks_are_uniform_over_positions() -> None:
    hits = sum(
        random_mask(torch.empty(4, 5), 5, generator(seed, 0, "a")).double() for seed in range(2000)
    )
    assert isinstance(hits, torch.Tensor)
    # 500 expected at each of 20 positions, standard deviation 19.4.
    assert float((hits - 500).abs().max()) < 5 * 19.4


def test_masks_take_the_memory_layout_of_the_weight() -> None:
    weight = torch.randn(8, 4, 3, 3)
    last = weight.to(memory_format=torch.channels_last)
    plain = random_mask(weight, 30, generator(0, 0, "a"))
    laid = random_mask(last, 30, generator(0, 0, "a"))
    assert laid.stride() == last.stride() != plain.stride()
    assert torch.equal(plain, laid)


def test_magnitude_masks_keep_the_largest() -> None:
    weight = torch.tensor([[0.1, -3.0, 0.0], [2.0, -0.2, 0.3]])
    assert magnitude_mask(weight, 3).tolist() == [[False, True, False], [True, False, True]]


def test_no_layer_is_left_empty() -> None:
    layers = [_layer("big", (100, 100)), _layer("tiny", (3, 3))]
    nonzeros = counts(layers, densities(layers, 0.01, "uniform"))
    assert nonzeros == {"big": 100, "tiny": 1}


def _layer(name: str, shape: Shape, dense: bool = False) -> Layer:
    return Layer(name=name, weight=nn.Parameter(torch.empty(shape)), dense=dense)
