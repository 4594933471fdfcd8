from __future__ import annotations

import pytest
import torch
from torch import nn

from moon.errors import UsageError
from moon.trainer.accounting.flops import count_flops
from moon.trainer.models import build, first_conv, head_name


@pytest.mark.parametrize("side", [8, 15, 16, 28, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_cnn_takes_small_images(side: int, channels: int) -> None:
    model = build("cnn", outputs=11, channels=channels, size=(side, side))
    assert model.training
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 11)


@pytest.mark.parametrize("size", [(8, 200), (200, 8), (28, 65), (100, 64)])
def test_the_small_cnn_takes_images_that_are_not_square(size: tuple[int, int]) -> None:
    model = build("cnn", outputs=3, channels=1, size=size)
    assert model(torch.zeros(2, 1, *size)).shape == (2, 3)


def test_the_small_cnn_costs_what_its_docstring_says() -> None:
    costs = {}
    for side in (28, 63, 64, 128):
        model = build("cnn", outputs=11, channels=1, size=(side, side))
        costs[side] = count_flops(model, torch.zeros(1, 1, side, side))
    assert costs[28][-1].shape[0] == 11
    assert sum(cost.flops for cost in costs[28]) / 2 == pytest.approx(9.3e6, rel=0.01)
    assert [len(found) - 1 for found in costs.values()] == [3, 3, 4, 5]


def test_resnets_keep_small_images_whole() -> None:
    small = build("resnet18", outputs=11, channels=3, size=(32, 32))
    assert small.conv1.kernel_size == (3, 3)
    assert isinstance(small.maxpool, nn.Identity)
    # The published size of the CIFAR ResNet-18 with ten outputs, and one output more.
    assert sum(p.numel() for p in small.parameters()) == 11_173_962 + 513
    shapes = []
    handle = small.layer4.register_forward_hook(lambda m, i, o: shapes.append(o.shape[2:]))
    small(torch.zeros(2, 3, 32, 32))
    handle.remove()
    assert shapes == [(4, 4)]
    large = build("resnet18", outputs=5, channels=1, size=(96, 96))
    assert large.conv1.kernel_size == (7, 7)
    assert large.conv1.in_channels == 1


def test_resnet50_at_full_size() -> None:
    model = build("resnet50", outputs=1000, size=(224, 224))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_wide_resnet() -> None:
    model = build("wrn28-10", outputs=10, size=(32, 32))
    assert sum(p.numel() for p in model.parameters()) == 36_479_194
    assert head_name(model) == "head"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1"])
def test_any_classifier_of_torchvision(name: str) -> None:
    model = build(name, outputs=7, channels=1, size=(64, 64)).eval()
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


def test_auxiliary_outputs_are_left_out() -> None:
    model = build("googlenet", outputs=4, size=(64, 64))
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_the_seed_decides_the_weights_and_touches_no_other_randomness() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (
        build("cnn", outputs=3, channels=1, size=(8, 8), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    norms = [module for module in one.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert not norm.running_mean.any(), "trying the model out must not move its statistics"


def test_stem_and_head() -> None:
    model = build("resnet18", outputs=3, size=(32, 32))
    conv = first_conv(model)
    assert conv is not None
    assert conv[0] == "conv1"
    assert head_name(model) == "fc"
    with pytest.raises(UsageError, match="neither"):
        head_name(nn.ReLU())


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"there is no model resnet19\. Give one of cnn"):
        build("resnet19", outputs=3)
    with pytest.raises(UsageError, match="vit_b_16 cannot take images of 3x64x64"):
        build("vit_b_16", outputs=3, size=(64, 64))
