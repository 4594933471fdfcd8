from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from moon.errors import UsageError
from moon.trainer import augment
from moon.trainer.objective.dac import AbstentionLoss
from moon.trainer.objective.logitnorm import LogitNorm
from moon.trainer.objective.loss import UnknownAwareLoss
from moon.trainer.objective.mixup import Mixup, draw_mixup

CPU = torch.device("cpu")
HALF = Mixup(share=torch.tensor(0.75), partners=torch.tensor([2, 0, 1]))


def test_images_by_hand() -> None:
    x = torch.tensor([[0.0, 4.0], [8.0, 0.0], [4.0, 4.0]])
    assert HALF.mix(x).tolist() == [[1.0, 4.0], [6.0, 1.0], [5.0, 3.0]]


def test_the_layout_of_images_stays() -> None:
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    mixed = HALF.mix(x)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(mixed, 0.75 * x + 0.25 * x[[2, 0, 1]])
    assert torch.equal(HALF.mix(x.contiguous()), mixed)
    assert HALF.mix(x.bfloat16()).dtype is torch.bfloat16


def test_a_share_of_one_changes_nothing() -> None:
    alone = Mixup(share=torch.tensor(1.0), partners=torch.tensor([2, 0, 1]))
    x = torch.randn(3, 7)
    target = torch.tensor([0, 1, 2])
    assert torch.equal(alone.mix(x), x)
    found = alone.loss(nn.CrossEntropyLoss(), x, target)
    assert torch.equal(found, F.cross_entropy(x, target))


def test_loss_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]], dtype=torch.float64)
    target = torch.tensor([0, 1, 2])  # The partners' labels are 2, 0, 1.
    loss = HALF.loss(nn.CrossEntropyLoss(), p.log(), target)
    first = -(math.log(0.5) + math.log(0.8) + math.log(0.2)) / 3
    second = -(math.log(0.2) + math.log(0.1) + math.log(0.2)) / 3
    assert loss.item() == pytest.approx(0.75 * first + 0.25 * second, rel=1e-12)


def test_it_is_cross_entropy_with_soft_labels() -> None:
    z = torch.randn(3, 5, dtype=torch.float64)
    target = torch.tensor([4, 1, 1])
    one_hot = F.one_hot(target, 5).double()
    soft = 0.75 * one_hot + 0.25 * one_hot[[2, 0, 1]]
    found = HALF.loss(nn.CrossEntropyLoss(), z, target)
    assert found.item() == pytest.approx(F.cross_entropy(z, soft).item(), rel=1e-12)


@pytest.mark.parametrize(
    "criterion",
    [
        UnknownAwareLoss(auto=False, w_final=2.0),
        AbstentionLoss(auto=False, alpha_final=0.5),
        LogitNorm(UnknownAwareLoss(auto=False, w_final=2.0)),
    ],
)
def test_any_criterion(criterion: nn.Module) -> None:
    z, target = torch.randn(3, 6, dtype=torch.float64), torch.tensor([4, 1, 0])
    expected = 0.75 * criterion(z, target) + 0.25 * criterion(z, target[[2, 0, 1]])
    assert HALF.loss(criterion, z, target).item() == pytest.approx(expected.item(), rel=1e-12)
    assert criterion.training


def test_a_moving_average_takes_the_first_label_alone() -> None:
    z, target = torch.randn(3, 6, dtype=torch.float64), torch.tensor([4, 1, 0])
    plain, mixed = UnknownAwareLoss(), UnknownAwareLoss()
    plain(z, target)
    HALF.loss(mixed, z, target)
    HALF.loss(mixed.eval(), z, target[[2, 0, 1]])
    assert mixed.auto_weight.average == plain.auto_weight.average is not None
    assert not mixed.training


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    def draw(seed: int, epoch: int) -> list[Mixup]:
        return draw_mixup([64, 64, 7], alpha=1.0, seed=seed, epoch=epoch, device=CPU)

    first, again = draw(0, 1), draw(0, 1)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.share, two.share) and torch.equal(one.partners, two.partners)
    for other in (draw(1, 1), draw(0, 2)):
        assert not torch.equal(first[0].share, other[0].share)
        assert not torch.equal(first[0].partners, other[0].partners)
    assert not torch.equal(first[0].share, first[1].share)
    assert not torch.equal(first[0].partners, first[1].partners)
    crops = augment.generator(0, 1, augment.AUGMENT).random()
    assert crops != augment.generator(0, 1, augment.MIXUP).random()


@given(st.lists(st.integers(1, 40), max_size=5), st.floats(0.01, 10), st.integers(0, 99))
def test_every_batch_has_a_permutation_and_a_major_share(
    sizes: list[int], alpha: float, seed: int
) -> None:
    drawn = draw_mixup(sizes, alpha=alpha, seed=seed, epoch=1, device=CPU)
    assert [len(one.partners) for one in drawn] == sizes
    for one in drawn:
        assert sorted(one.partners.tolist()) == list(range(len(one.partners)))
        assert one.share.shape == () and one.share.dtype is torch.float32
        assert 0.5 <= one.share.item() <= 1.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_shares_are_those_of_a_folded_beta(alpha: float) -> None:
    drawn = draw_mixup([1] * 4000, alpha=alpha, seed=0, epoch=1, device=CPU)
    shares = np.array([one.share.item() for one in drawn])
    beta = stats.beta(alpha, alpha)
    assert stats.kstest(shares, lambda x: beta.cdf(x) - beta.cdf(1 - x)).pvalue > 1e-3
    assert shares.mean() == pytest.approx(stats.beta(alpha + 1, alpha).sf(0.5), abs=0.01)


def test_in_place_copies_for_captured_graphs() -> None:
    first, second = draw_mixup([5, 5], alpha=1.0, seed=0, epoch=1, device=CPU)
    static = first.clone()
    static.copy_(second)
    assert torch.equal(static.partners, second.partners) and static.share == second.share
    assert not torch.equal(first.partners, second.partners)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha of mixup"):
        draw_mixup([4], alpha=alpha, seed=0, epoch=1, device=CPU)


def test_another_size() -> None:
    with pytest.raises(UsageError, match=r"a mixing of 3 images came with \[4, 2\]"):
        HALF.mix(torch.zeros(4, 2))
    with pytest.raises(UsageError, match="a mixing of 3 images"):
        HALF.loss(nn.CrossEntropyLoss(), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
