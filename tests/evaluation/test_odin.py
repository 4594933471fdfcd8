from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from moon.errors import MissingExtraError, UsageError
from moon.evaluation.odin import odin


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return layer.eval()


# z = x0 + 2 x1, -x0 + 3 x1: towards the first is [+, -], towards the second [-, +].
TWO = linear([[1.0, 2.0], [-1.0, 3.0]])
X = torch.tensor([[2.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)


def convolution() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(54, 5)]
    return nn.Sequential(*layers).eval()


IMAGES = torch.rand(7, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    # First: x' = [2.1, 0.9], z = 3.9, 0.6. Second: x' = [-1.1, 2.1], z = 3.1, 7.4.
    expected = [1 / (1 + math.exp(-3.3 / 10)), 1 / (1 + math.exp(-4.3 / 10))]
    assert odin(TWO, X, temperature=10.0, eps=0.1) == pytest.approx(expected, rel=1e-12)
    still = [1 / (1 + math.exp(-3 / 10)), 1 / (1 + math.exp(-4 / 10))]
    assert odin(TWO, X, temperature=10.0, eps=0.0) == pytest.approx(still, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    # Each logit gap moves by 3 eps.
    expected = [1 / (1 + math.exp(-(gap + 3 * 0.0014) / 1000)) for gap in (3, 4)]
    found = odin(TWO, X)
    assert found == pytest.approx(expected, rel=1e-13) and found.dtype == np.float64


def test_the_softmax_of_a_float32_model_is_float64() -> None:
    expected = [1 / (1 + math.exp(-gap / 1000)) for gap in (3, 4)]
    narrow = linear([[1.0, 2.0], [-1.0, 3.0]]).float()
    assert odin(narrow, X.float(), eps=0.0) == pytest.approx(expected, rel=1e-14)


def test_std_divides_the_step_of_each_channel() -> None:
    # Steps 0.2 and 0.4: gaps 2 x0 - x1 = 3 + 0.8 and -2 x0 + x1 = 4 + 0.8.
    expected = [1 / (1 + math.exp(-3.8)), 1 / (1 + math.exp(-4.8))]
    found = odin(TWO, X, temperature=1.0, eps=0.1, std=[0.5, 0.25])
    assert found == pytest.approx(expected, rel=1e-12)
    images = odin(convolution(), IMAGES, std=[0.2, 0.3, 0.1])
    assert (images != odin(convolution(), IMAGES)).all()


def test_the_unknown_class_is_never_the_answer_but_in_the_softmax() -> None:
    # The unknown logit, first, is the largest, and away from it is the same way for both.
    three = linear([[0.0, 9.0], [1.0, 2.0], [-1.0, 3.0]])
    found = odin(three, X[:1], unknown_index=0, temperature=10.0, eps=0.1)
    # grad log p_1 = (z_1 row - sum p row) / T, its sign [+, -]: x' = [2.1, 0.9].
    z = np.array([8.1, 3.9, 0.6]) / 10
    assert found == pytest.approx([np.exp(z[1]) / np.exp(z).sum()], rel=1e-12)
    assert found == pytest.approx(odin(three, X[:1], unknown_index=-3, temperature=10.0, eps=0.1))


def test_the_step_raises_confidence_and_batches_change_nothing() -> None:
    model = convolution()
    still = odin(model, IMAGES, eps=0.0)
    moved = odin(model, IMAGES, eps=0.01)
    assert (moved > still).all()
    alone = odin(model, IMAGES, eps=0.01, batch_size=3)
    assert alone == pytest.approx(moved, rel=1e-9)
    assert odin(model, IMAGES[:0]).shape == (0,)


def test_nothing_is_left_behind() -> None:
    model, images = convolution(), IMAGES.clone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    odin(model, images)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None and not images.requires_grad and torch.equal(images, IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_are_taken_where_the_caller_has_switched_them_off() -> None:
    model = convolution()
    expected = odin(model, IMAGES)
    with torch.no_grad():
        assert np.array_equal(odin(model, IMAGES), expected)
    with torch.inference_mode():
        assert np.array_equal(odin(model, IMAGES.clone()), expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert np.array_equal(odin(model, IMAGES), expected)


def test_wrong_use_is_named() -> None:
    with pytest.raises(UsageError, match=r"eval mode"):
        odin(linear([[1.0]]).train(), X[:, :1])
    with pytest.raises(UsageError, match=r"eval mode"):
        model = convolution()
        model[1].train()
        odin(model, IMAGES)
    with pytest.raises(UsageError, match=r"needs a PyTorch model.* not a function"):
        odin(lambda x: x, X)  # type: ignore[arg-type]
    for bad in (X.long(), X[0], X.numpy()):
        with pytest.raises(UsageError, match=r"floating-point tensor"):
            odin(TWO, bad)
    with pytest.raises(UsageError, match=r"unknown_index 2 is outside the 2 logits"):
        odin(TWO, X, unknown_index=2)
    for temperature in (0.0, math.inf):
        with pytest.raises(UsageError, match=r"temperature must be a positive"):
            odin(TWO, X, temperature=temperature)
    with pytest.raises(UsageError, match=r"eps must be 0 or a positive"):
        odin(TWO, X, eps=-0.1)
    with pytest.raises(UsageError, match=r"batch size"):
        odin(TWO, X, batch_size=0)
    for std in ([0.5], [0.5, 0.0]):
        with pytest.raises(UsageError, match=r"2 positive numbers, one a channel"):
            odin(TWO, X, std=std)
    with pytest.raises(UsageError, match=r"answer \[N, L\], not \[2, 2, 1\]"):
        odin(nn.Sequential(TWO, nn.Unflatten(1, (2, 1))).eval(), X)


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_a_model_without_gradients_is_refused_and_never_approximated() -> None:
    with pytest.raises(UsageError, match=r"no gradient by its input.*differentiable"):
        odin(Rounded().eval(), X)


def test_torch_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"odin needs the package torch.*\[train\]"):
        odin(TWO, X)


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_ood") is None, reason="pytorch-ood is not installed"
)
def test_the_other_library_agrees() -> None:
    from pytorch_ood.detector import ODIN

    model, std = convolution().double(), [0.2, 0.3, 0.1]
    other = ODIN(model, eps=0.01, temperature=10.0, norm_std=std).predict(IMAGES.double())
    ours = odin(model, IMAGES.double(), eps=0.01, temperature=10.0, std=std)
    assert ours == pytest.approx(-other.numpy(), rel=1e-12)
