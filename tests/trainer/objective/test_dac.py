from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moon.errors import TrainingError, UsageError
from moon.trainer.objective.dac import AbstentionLoss


def logits(seed: int = 0, rows: int = 32, outputs: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    return values, torch.randint(0, outputs - 1, (rows,), generator=draw)


def fixed(alpha: float, unknown_index: int = -1) -> AbstentionLoss:
    return AbstentionLoss(auto=False, alpha_final=alpha, unknown_index=unknown_index)


def naive(values: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Equation 1 as printed, the abstention last."""
    p = torch.softmax(values, dim=1)
    abstain = p[:, -1]
    right = p.gather(1, target[:, None])[:, 0]
    among = -torch.log(right / (1 - abstain))
    return ((1 - abstain) * among + alpha * torch.log(1 / (1 - abstain))).mean()


def test_two_samples_by_hand() -> None:
    p = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.1, 0.4]], dtype=torch.float64)
    loss = fixed(2.0)(p.log(), torch.tensor([0, 1]))
    first = -0.7 * math.log(0.5 / 0.7) - 2 * math.log(0.7)
    second = -0.6 * math.log(0.1 / 0.6) - 2 * math.log(0.6)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)


@given(st.floats(0, 20, width=32), st.integers(0, 1000))
def test_value_and_gradient_of_the_printed_formula(alpha: float, seed: int) -> None:
    values, target = logits(seed, rows=7)
    one, two = values.clone().requires_grad_(), values.clone().requires_grad_()
    found, expected = fixed(alpha)(one, target), naive(two, target, alpha)
    found.backward(), expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-8, atol=1e-12)


def test_gradcheck() -> None:
    values, target = logits(rows=4)
    assert torch.autograd.gradcheck(lambda z: fixed(0.7)(z, target), (values.requires_grad_(),))


def test_the_abstention_may_be_any_logit() -> None:
    values, target = logits()
    moved = torch.cat([values[:, -1:], values[:, :-1]], dim=1)
    assert torch.allclose(
        fixed(0.5, unknown_index=0)(moved, target + 1), fixed(0.5)(values, target), rtol=1e-12
    )
    assert torch.equal(fixed(0.5, unknown_index=5)(values, target), fixed(0.5)(values, target))


@pytest.mark.parametrize("abstain", [-200.0, -30.0, 0.0, 30.0, 200.0, 1e4])
def test_extreme_logits(abstain: float) -> None:
    # One known class, so H = 0 and the loss is alpha * softplus(z_a - z_1) alone.
    values = torch.tensor([[0.0, abstain]], requires_grad=True)
    loss = fixed(3.0)(values, torch.tensor([0]))
    exact = 3 * (abstain + math.log1p(math.exp(-abstain)) if abstain > 0
                 else math.log1p(math.exp(abstain)))  # fmt: skip
    assert loss.item() == pytest.approx(exact, rel=1e-6, abs=1e-44)
    loss.backward()
    assert values.grad is not None
    share = 1 / (1 + math.exp(-abstain)) if abstain > -300 else 0.0
    assert values.grad[0, 1].item() == pytest.approx(3 * share, rel=1e-6, abs=1e-30)
    assert values.grad[0, 0].item() == pytest.approx(-3 * share, rel=1e-6, abs=1e-30)


def test_a_hopeless_sample_pulls_towards_abstaining_and_a_high_price_away() -> None:
    values = torch.tensor([[8.0, 0.0, 0.0]], requires_grad=True)
    slopes = []
    for alpha in (0.1, 100.0):
        (slope,) = torch.autograd.grad(fixed(alpha)(values, torch.tensor([1])), values)
        slopes.append(slope[0, 2].item())
    assert slopes[0] < 0 < slopes[1]


def test_alpha_through_the_epochs() -> None:
    criterion = AbstentionLoss(total_epochs=10, warmup_epochs=3, alpha_final=2.0, init_factor=4.0)
    values, target = logits()
    seen = {}
    for epoch in range(1, 13):
        criterion.start_epoch(epoch)
        seen[epoch] = criterion.alpha
        criterion(values.requires_grad_(), target)
    p = torch.softmax(values.detach(), 1)
    among = F.cross_entropy(values.detach()[:, :-1], target, reduction="none")
    start = ((1 - p[:, -1]) * among).mean().item() / 4
    assert seen[1] == seen[2] == seen[3] == 0.0
    for epoch in range(4, 11):
        expected = start + (epoch - 4) / 6 * (2 - start)
        assert seen[epoch] == pytest.approx(expected, rel=1e-6)
    assert seen[10] == seen[11] == seen[12] == 2.0
    assert criterion.w == criterion.alpha


def test_the_warm_up_is_cross_entropy_over_all_logits_and_averages() -> None:
    criterion = AbstentionLoss(total_epochs=10, warmup_epochs=1, init_factor=1.0)
    criterion.start_epoch(1)
    average = 0.0
    for i in range(4):
        values, target = logits(i)
        assert torch.equal(criterion(values, target), F.cross_entropy(values, target))
        p = torch.softmax(values, 1)[:, -1]
        among = F.cross_entropy(values[:, :-1], target, reduction="none")
        batch = ((1 - p) * among).mean().item()
        average = batch if i == 0 else 0.95 * average + 0.05 * batch
    assert criterion.auto_weight.average == pytest.approx(average, rel=1e-6)
    criterion.eval()
    criterion(*logits(9))
    criterion.train()
    with torch.no_grad():
        criterion(*logits(9))
    assert criterion.auto_weight.average == pytest.approx(average, rel=1e-6)
    criterion.start_epoch(2)
    assert criterion.alpha == pytest.approx(average, rel=1e-6)
    criterion(*logits(9))
    assert criterion.auto_weight.average == pytest.approx(average, rel=1e-6)


def test_one_epoch_after_the_warm_up_has_the_final_price() -> None:
    criterion = AbstentionLoss(total_epochs=2, warmup_epochs=1, alpha_final=3.0)
    criterion.start_epoch(1)
    criterion(*logits())
    criterion.start_epoch(2)
    assert criterion.alpha == 3.0


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_bit_exact(stop: int) -> None:
    def run(criterion: AbstentionLoss, epochs: range) -> list[float]:
        losses = []
        for epoch in epochs:
            criterion.start_epoch(epoch)
            losses += [criterion(*logits(10 * epoch + i)).item() for i in range(3)]
        return losses

    def make() -> AbstentionLoss:
        return AbstentionLoss(total_epochs=6, warmup_epochs=2)

    whole = run(make(), range(1, 7))
    first, second = make(), make()
    head = run(first, range(1, stop + 1))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.alpha == first.alpha
    assert head + run(second, range(stop + 1, 7)) == whole


def test_branches_and_dtypes() -> None:
    criterion = AbstentionLoss(total_epochs=3, warmup_epochs=1)
    criterion.start_epoch(1)
    values, target = logits()
    criterion(values, target)
    warm = criterion.branch
    criterion.start_epoch(2)
    assert criterion.branch != warm
    half = values.bfloat16()
    assert criterion(half, target).dtype == torch.float32
    assert torch.equal(criterion(half, target), criterion(half.float(), target))
    assert torch.equal(
        torch.compile(criterion, backend="eager", fullgraph=True)(values, target),
        criterion(values, target),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 0}, "needs a warm-up"),
        ({"total_epochs": 5, "warmup_epochs": 5}, "Leave at least one epoch"),
        ({"alpha_final": -1.0}, r"alpha_final is -1\.0"),
        ({"init_factor": 0.0}, "init_factor above 0"),
    ],
)
def test_bad_constants(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AbstentionLoss(**options)


def test_bad_calls() -> None:
    values, target = logits()
    with pytest.raises(TrainingError, match="no batch of the warm-up"):
        AbstentionLoss().start_epoch(21)
    with pytest.raises(UsageError, match="count from 1"):
        AbstentionLoss().start_epoch(-1)
    with pytest.raises(UsageError, match=r"not \[32, 6\] and \[31\]"):
        fixed(1.0)(values, target[1:])
    with pytest.raises(UsageError, match=r"not torch\.float32"):
        fixed(1.0)(values, target.float())
    with pytest.raises(UsageError, match="unknown_index 6 is outside the 6 logits"):
        fixed(1.0, unknown_index=6)(values, target)
