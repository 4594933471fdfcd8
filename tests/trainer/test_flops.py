from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from moon.errors import UsageError
from moon.trainer.flops import LayerCost, count_flops, training_flops
from moon.trainer.topology import counts, densities, find_layers
from tests.trainer.small import make


def cost(flops: int, dense: int) -> LayerCost:
    return LayerCost(name="a", shape=(1,), nonzeros=1, density=1.0, flops=flops, dense_flops=dense)


def test_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # 8x8 -> 4x4: 16 places of 72 weights
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # 4x4 inputs of 32 weights
        nn.Conv2d(2, 2, 3, groups=2),  # 8x8 -> 6x6: 36 places of 18 weights
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    costs = count_flops(model, torch.zeros(1, 2, 8, 8))
    assert [c.dense_flops for c in costs] == [2 * 16 * 72, 2 * 16 * 32, 2 * 36 * 18, 2 * 360]
    assert [c.flops for c in costs] == [c.dense_flops for c in costs]
    assert [c.name for c in costs] == ["0.weight", "1.weight", "2.weight", "4.weight"]
    assert [c.shape for c in costs] == [(4, 2, 3, 3), (4, 2, 2, 2), (2, 1, 3, 3), (5, 72)]


def test_linear_layers_count_every_row_and_shared_layers_every_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(self.layer(x))
            return found

    used, unused = count_flops(Twice(), torch.zeros(1, 7, 6))
    assert used.dense_flops == 2 * 2 * 7 * 36 and unused.dense_flops == 0


def test_sparse_layers_cost_by_their_nonzeros() -> None:
    model, _, sparsifier = make()
    example = torch.zeros(1, 1, 6, 6)
    by_mask = count_flops(model, example, sparsifier.masks)
    for layer in by_mask:
        assert layer.nonzeros == sparsifier.nonzeros[layer.name]
        assert layer.density == sparsifier.densities[layer.name]
        assert layer.flops == pytest.approx(layer.dense_flops * layer.density)
    assert by_mask == count_flops(model, example)
    with torch.no_grad():
        model[4].weight.zero_()
    assert by_mask == count_flops(model, example, sparsifier.masks)
    assert count_flops(model, example)[1].flops == 0


def test_counting_leaves_the_model_as_it_was() -> None:
    model, _, _ = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, torch.ones(1, 1, 6, 6))
    assert model.training and not model[0]._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match=r"one example, not \[2, 1, 6, 6\]"):
        count_flops(model, torch.ones(2, 1, 6, 6))


@pytest.mark.parametrize(("density", "published"), [(0.2, 0.42), (0.1, 0.24), (0.05, 0.12)])
def test_resnet50_at_the_published_share_of_dense_flops(density: float, published: float) -> None:
    # Evci et al. 2020, table of ResNet-50 with ERK; dense 8.2e9 FLOPs.
    model = resnet50()
    layers = find_layers(model)
    nonzeros = counts(layers, densities(layers, density))
    costs = count_flops(model, torch.zeros(1, 3, 224, 224))
    dense = sum(c.dense_flops for c in costs)
    sparse = sum(
        c.dense_flops * nonzeros[layer.name] / layer.size
        for c, layer in zip(costs, layers, strict=True)
    )
    assert dense == pytest.approx(8.2e9, rel=0.01)
    assert sparse / dense == pytest.approx(published, abs=0.007)


def test_training_by_the_formula() -> None:
    costs = [cost(10, 100), cost(20, 50)]
    per_update = (3 * 30 * 100 + 2 * 30 + 150) / 101
    rigl = training_flops(costs, rule="rigl", examples=1000, interval=100, updating=0.7)
    assert rigl == pytest.approx(1000 * (0.7 * per_update + 0.3 * 90))
    assert training_flops(costs, rule="set", examples=1000) == 90_000
    assert training_flops(costs, rule="static", examples=1000) == 90_000
    assert training_flops(costs, rule="dense", examples=1000) == 450_000
    with pytest.raises(UsageError, match="the rule 'gmp'"):
        training_flops(costs, rule="gmp", examples=1)
