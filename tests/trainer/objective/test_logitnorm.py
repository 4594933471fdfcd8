from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moon.errors import UsageError
from moon.trainer.objective.dac import AbstentionLoss
from moon.trainer.objective.logitnorm import LogitNorm
from moon.trainer.objective.loss import UnknownAwareLoss


def logits(seed: int = 0, rows: int = 16, outputs: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    return values, torch.randint(0, outputs - 1, (rows,), generator=draw)


def test_one_sample_by_hand() -> None:
    # ||(3, 4)|| = 5, so with tau = 0.5 the logits are (1.2, 1.6) and y = 0.
    loss = LogitNorm(tau=0.5)(torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.4)), rel=1e-7)


@given(st.floats(0.01, 10), st.integers(0, 1000))
def test_value_and_gradient_of_the_printed_formula(tau: float, seed: int) -> None:
    values, target = logits(seed)
    one, two = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = LogitNorm(tau=tau)(one, target)
    length = (two**2).sum(1, keepdim=True).sqrt()
    expected = F.cross_entropy(two / (length + 1e-7) / tau, target)
    found.backward(), expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-8, atol=1e-9)


@given(st.floats(1e-2, 1e6))
def test_the_length_of_the_logits_does_not_matter(factor: float) -> None:
    values, target = logits()
    assert LogitNorm()(factor * values, target).item() == pytest.approx(
        LogitNorm()(values, target).item(), rel=1e-4
    )


def test_each_sample_has_its_own_length() -> None:
    values, target = logits()
    apart = torch.stack([LogitNorm()(values[i : i + 1], target[i : i + 1]) for i in range(16)])
    assert LogitNorm()(values, target).item() == pytest.approx(apart.mean().item(), rel=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4, 1e15])
def test_extreme_logits(size: float) -> None:
    values = torch.full((2, 4), size, requires_grad=True)
    loss = LogitNorm()(values, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert values.grad is not None and bool(values.grad.isfinite().all())


@pytest.mark.parametrize(
    "inner",
    [
        UnknownAwareLoss(auto=False, w_final=1.5),
        AbstentionLoss(auto=False, alpha_final=0.5),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_it_wraps_any_criterion(inner: nn.Module) -> None:
    values, target = logits()
    normalised = values / (0.04 * values.norm(dim=1, keepdim=True))
    wrapped = LogitNorm(inner)
    assert wrapped(values, target).item() == pytest.approx(inner(normalised, target).item(), 1e-6)
    assert wrapped.w == getattr(inner, "w", 0.0)
    assert wrapped.branch == getattr(inner, "branch", None)
    wrapped.start_epoch(1)


def test_the_criterion_is_told_of_epochs_and_saved() -> None:
    def make() -> LogitNorm:
        return LogitNorm(UnknownAwareLoss(total_epochs=6, warmup_epochs=2))

    def run(criterion: LogitNorm, epochs: range) -> list[float]:
        losses = []
        for epoch in epochs:
            criterion.start_epoch(epoch)
            losses += [criterion(*logits(10 * epoch + i)).item() for i in range(3)]
        return losses

    whole = run(make(), range(1, 7))
    first, second = make(), make()
    head = run(first, range(1, 4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.w == first.w > 0
    assert head + run(second, range(4, 7)) == whole


def test_dtypes_and_compile() -> None:
    values, target = logits()
    half = values.bfloat16()
    assert LogitNorm()(half, target).dtype == torch.float32
    assert torch.equal(LogitNorm()(half, target), LogitNorm()(half.float(), target))
    compiled = torch.compile(LogitNorm(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(values, target), LogitNorm()(values, target))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_tau(tau: float) -> None:
    with pytest.raises(UsageError, match="temperature above 0"):
        LogitNorm(tau=tau)


def test_bad_logits() -> None:
    with pytest.raises(UsageError, match=r"\[N, K\], not \[3\]"):
        LogitNorm()(torch.zeros(3), torch.tensor(0))
