from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from moon.errors import UsageError
from moon.trainer.accounting.flops import count_flops
from moon.trainer.models import build
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import find_layers
from tests.trainer.small import make


def conv(width_in: int, width_out: int, kernel: int, side: int) -> int:
    """Multiply-accumulates of a square convolution whose output has ``side`` * ``side`` places."""
    return width_in * width_out * kernel * kernel * side * side


def test_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # 8x8 -> 4x4: 16 places of 72 weights
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # 4x4 inputs of 32 weights, 8x8 outputs
        nn.Conv2d(2, 2, 3, groups=2),  # 8x8 -> 6x6: 36 places of 18 weights
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    costs = count_flops(model, torch.zeros(1, 2, 8, 8))
    assert [c.dense_flops for c in costs] == [2 * 16 * 72, 2 * 16 * 32, 2 * 36 * 18, 2 * 360]
    assert [c.flops for c in costs] == [c.dense_flops for c in costs]
    assert [c.name for c in costs] == ["0.weight", "1.weight", "2.weight", "4.weight"]
    assert [c.shape for c in costs] == [(4, 2, 3, 3), (4, 2, 2, 2), (2, 1, 3, 3), (5, 72)]
    # Outputs in float32: 4x4x4, 2x8x8, 2x6x6 and 5 numbers.
    assert [c.activation_bytes for c in costs] == [4 * 64, 4 * 128, 4 * 72, 4 * 5]


def test_depthwise_and_grouped_transposed_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1, groups=6),  # 5x5: 25 places of 6 * 9 weights
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),  # 25 inputs of 6 * 2 * 9 weights
    )
    depthwise, transposed = count_flops(model, torch.zeros(1, 6, 5, 5))
    assert depthwise.dense_flops == 2 * 25 * 54
    assert transposed.dense_flops == 2 * 25 * 108
    # 5x5 -> 11x11, four channels.
    assert transposed.activation_bytes == 4 * 4 * 121


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
    assert used.activation_bytes == 2 * 7 * 6 * 4 and unused.activation_bytes == 0


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


def test_resnet18_for_small_images_by_hand() -> None:
    """Stem 3x3 at 32x32; four stages of two blocks of two 3x3 convolutions, each stage but the
    first halving the side, doubling the width and starting with a 1x1 shortcut."""
    expected = conv(3, 64, 3, 32) + 4 * conv(64, 64, 3, 32)
    for stage in (1, 2, 3):
        width, side = 64 << stage, 32 >> stage
        first = conv(width // 2, width, 3, side) + conv(width // 2, width, 1, side)
        expected += first + 3 * conv(width, width, 3, side)
    expected += 512 * 10
    assert expected == 555_422_720
    costs = count_flops(build("resnet18", outputs=10), torch.zeros(1, 3, 32, 32))
    assert sum(c.dense_flops for c in costs) == 2 * expected


def test_resnet50_by_hand() -> None:
    """Stem 7x7 at 112x112, then 3, 4, 6, 3 bottlenecks; torchvision gives 4.09 GMAC."""
    expected, width_in = conv(3, 64, 7, 112), 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outer, side = 64 << stage, 256 << stage, 56 >> stage
        for block in range(blocks):
            # The 3x3 convolution has the stride, so the 1x1 before it still sees the larger side.
            before = side * 2 if block == 0 and stage else side
            expected += conv(width_in, inner, 1, before) + conv(inner, inner, 3, side)
            expected += conv(inner, outer, 1, side)
            expected += conv(width_in, outer, 1, side) if block == 0 else 0
            width_in = outer
    expected += 2048 * 1000
    assert expected == 4_089_184_256
    costs = count_flops(resnet50(), torch.zeros(1, 3, 224, 224))
    assert sum(c.dense_flops for c in costs) == 2 * expected


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
