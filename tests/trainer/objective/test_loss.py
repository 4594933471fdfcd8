from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.objective.loss import UnknownAwareLoss


def logits(seed: int = 0, rows: int = 32, outputs: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    return values, torch.randint(0, outputs - 1, (rows,), generator=draw)


def fixed(w: float, unknown_index: int = -1) -> UnknownAwareLoss:
    return UnknownAwareLoss(auto=False, w_final=w, unknown_index=unknown_index)


def test_two_samples_by_hand() -> None:
    # Sample 1 is right: p_y = .5. Sample 2 is wrong: p_y = .2, p_unknown = .3, w = 2,
    # so its weight is 1 + 2 / (1 + .6) = 2.25.
    p = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64)
    loss = fixed(2.0)(p.log(), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((-math.log(0.5) - 2.25 * math.log(0.2)) / 2, rel=1e-12)


def test_the_arg_max_runs_over_the_unknown_too() -> None:
    # The best known class is right, but the unknown is likelier: that is a mistake.
    p = torch.tensor([[0.3, 0.1, 0.6]], dtype=torch.float64)
    loss = fixed(1.0)(p.log(), torch.tensor([0]))
    assert loss.item() == pytest.approx(-(1 + 1 / 1.6) * math.log(0.3), rel=1e-12)


def test_the_unknown_index_is_any_column() -> None:
    values, target = logits()
    moved = values[:, [5, 0, 1, 2, 3, 4]]
    expected = fixed(1.0)(values, target)
    assert fixed(1.0, unknown_index=0)(moved, target + 1).item() == pytest.approx(expected.item())
    assert fixed(1.0, unknown_index=5)(values, target).item() == expected.item()
    assert fixed(1.0, unknown_index=2)(values, target).item() != expected.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_w_it_is_cross_entropy_to_the_bit(dtype: torch.dtype) -> None:
    for criterion in (UnknownAwareLoss(), fixed(0.0), UnknownAwareLoss(enabled=False)):
        values, target = logits()
        one = values.to(dtype).requires_grad_()
        two = values.to(dtype).requires_grad_()
        found, expected = criterion(one, target), F.cross_entropy(two, target)
        found.backward(), expected.backward()
        assert torch.equal(found, expected) and one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad)


def test_the_gradient_by_hand_flows_through_p_unknown() -> None:
    # d/dz of g(p_u) * L with g = 1 + w / (1 + w p_u), for one wrong sample:
    # g' * p_u * (1[u] - p) * L + g * (p - 1[y]),  g' = -w^2 / (1 + w p_u)^2.
    w, y, u = 1.5, 1, 2
    z = torch.tensor([[2.0, 0.3, -0.5]], dtype=torch.float64, requires_grad=True)
    fixed(w)(z, torch.tensor([y])).backward()
    p = torch.softmax(z.detach()[0], 0)
    one_u, one_y = torch.eye(3, dtype=torch.float64)[u], torch.eye(3, dtype=torch.float64)[y]
    loss, g = -p[y].log(), 1 + w / (1 + w * p[u])
    slope = -(w**2) / (1 + w * p[u]) ** 2
    expected = slope * p[u] * (one_u - p) * loss + g * (p - one_y)
    assert z.grad is not None and torch.allclose(z.grad[0], expected, rtol=1e-12)
    detached = g * (p - one_y)
    assert not torch.allclose(z.grad[0], detached, rtol=1e-3)


def test_gradcheck() -> None:
    values, target = logits(rows=5)
    assert torch.autograd.gradcheck(lambda z: fixed(1.3)(z, target), (values.requires_grad_(),))


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_a_mistake_never_weighs_less_than_cross_entropy(w: float, seed: int) -> None:
    values, target = logits(seed)
    plain = F.cross_entropy(values, target)
    found = fixed(w)(values, target)
    assert plain.item() <= found.item() <= (1 + w) * plain.item() * (1 + 1e-12)


def test_w_through_the_epochs() -> None:
    criterion = UnknownAwareLoss(total_epochs=10, warmup_epochs=2, w_final=1.0, init_factor=4.0)
    assert criterion.w == 0.0
    values, target = logits()
    seen = {}
    for epoch in range(1, 13):
        criterion.start_epoch(epoch)
        seen[epoch] = criterion.w
        criterion(values.requires_grad_(), target)
    p = torch.softmax(values.detach(), 1)[:, -1]
    e = ((1 - p) * F.cross_entropy(values.detach(), target, reduction="none")).mean().item()
    start = e / 4.0  # The same batch throughout, so the moving average stays at its value.
    assert seen[1] == seen[2] == 0.0
    for epoch in range(3, 11):
        expected = start + (epoch - 2) * (1.0 - start) / 8
        assert seen[epoch] == pytest.approx(expected, rel=1e-6)
    assert seen[10] == seen[11] == seen[12] == 1.0


def test_the_moving_average_by_hand() -> None:
    criterion = UnknownAwareLoss(total_epochs=10, warmup_epochs=1, init_factor=1.0)
    criterion.start_epoch(1)
    batches = [logits(seed) for seed in range(4)]
    expected = 0.0
    for i, (values, target) in enumerate(batches):
        criterion(values.requires_grad_(), target)
        p = torch.softmax(values.detach(), 1)[:, -1]
        each = (1 - p) * F.cross_entropy(values.detach(), target, reduction="none")
        batch = each.mean().item()
        expected = batch if i == 0 else 0.95 * expected + 0.05 * batch
    assert criterion.auto_weight.average == pytest.approx(expected, rel=1e-6)
    criterion.start_epoch(2)
    assert criterion.auto_weight.w_initial == pytest.approx(expected, rel=1e-6)
    assert criterion.w == pytest.approx(expected + (1 - expected) / 9, rel=1e-6)


def test_after_the_warm_up_the_average_rests() -> None:
    criterion = UnknownAwareLoss(total_epochs=4, warmup_epochs=1)
    criterion.start_epoch(1)
    criterion(*logits(0))
    criterion.start_epoch(2)
    average, initial = criterion.auto_weight.average, criterion.auto_weight.w_initial
    criterion(*logits(1))
    criterion.start_epoch(3)
    assert (criterion.auto_weight.average, criterion.auto_weight.w_initial) == (average, initial)


def test_validation_does_not_move_the_average() -> None:
    criterion = UnknownAwareLoss()
    values, target = logits()
    criterion.eval()
    criterion(values, target)
    criterion.train()
    with torch.no_grad():
        criterion(values, target)
    assert criterion.auto_weight.average is None
    criterion(values, target)
    assert criterion.auto_weight.average is not None


def test_a_batch_that_overflowed_is_left_out() -> None:
    criterion = UnknownAwareLoss()
    values, target = logits()
    criterion(values, target)
    average = criterion.auto_weight.average
    criterion(values * float("inf"), target)
    assert criterion.auto_weight.average == average


def test_epoch_zero_and_starting_late() -> None:
    criterion = UnknownAwareLoss(total_epochs=10, warmup_epochs=2)
    criterion.start_epoch(0)
    assert criterion.w == 0.0
    criterion.start_epoch(6)
    assert criterion.w == pytest.approx(0.5)
    criterion.start_epoch(1)
    assert criterion.w == 0.0
    with pytest.raises(UsageError, match="count from 1"):
        criterion.start_epoch(-1)


def test_switches() -> None:
    values, target = logits()
    without_auto = UnknownAwareLoss(auto=False, w_final=2.0)
    assert without_auto.w == 2.0
    without_auto.start_epoch(1)
    assert without_auto.w == 2.0
    without_loss = UnknownAwareLoss(enabled=False, auto=False, w_final=2.0)
    without_loss.start_epoch(50)
    assert without_loss.w == 0.0
    assert torch.equal(without_loss(values, target), F.cross_entropy(values, target))


def test_no_warm_up_starts_from_zero() -> None:
    criterion = UnknownAwareLoss(total_epochs=4, warmup_epochs=0)
    assert criterion.w == 0.0
    criterion.start_epoch(1)
    assert criterion.w == 0.25


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_bit_exact(stop: int) -> None:
    def run(criterion: UnknownAwareLoss, epochs: range) -> list[float]:
        losses = []
        for epoch in epochs:
            criterion.start_epoch(epoch)
            losses += [criterion(*logits(10 * epoch + i)).item() for i in range(3)]
        return losses

    def make() -> UnknownAwareLoss:
        return UnknownAwareLoss(total_epochs=6, warmup_epochs=2)

    whole = run(make(), range(1, 7))
    first, second = make(), make()
    head = run(first, range(1, stop + 1))
    run(second, range(1, 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.w == first.w
    assert head + run(second, range(stop + 1, 7)) == whole


def test_the_state_is_plain_and_nests(tmp_path: object) -> None:
    import io

    holder = nn.ModuleDict({"loss": UnknownAwareLoss()})
    holder["loss"](*logits())
    file = io.BytesIO()
    torch.save(holder.state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"loss": UnknownAwareLoss()})
    other.load_state_dict(torch.load(file, weights_only=True))
    one, two = holder["loss"], other["loss"]
    assert isinstance(one, UnknownAwareLoss) and isinstance(two, UnknownAwareLoss)
    assert one.auto_weight.average == two.auto_weight.average is not None
    with pytest.raises(TrainingError, match="not one of UnknownAwareLoss"):
        two.auto_weight.set_extra_state({"epoch": 1})


def test_low_precision_logits_are_computed_in_float32() -> None:
    values, target = logits()
    half = values.bfloat16()
    assert fixed(1.0)(half, target).dtype == torch.float32
    assert torch.equal(fixed(1.0)(half, target), fixed(1.0)(half.float(), target))


def test_large_logits_are_finite() -> None:
    values = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = fixed(1.0)(values, torch.tensor([1, 0]))
    loss.backward()
    assert torch.isfinite(loss) and values.grad is not None
    assert bool(torch.isfinite(values.grad).all())


def test_it_compiles() -> None:
    criterion = fixed(1.0)
    values, target = logits()
    assert torch.equal(
        torch.compile(criterion, backend="eager", fullgraph=True)(values, target),
        criterion(values, target),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_epochs": 5, "warmup_epochs": 5}, "Leave at least one epoch"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"w_final": -1.0}, "w_final is at least 0"),
        ({"w_final": float("nan")}, "w_final is at least 0"),
        ({"w_final": 1e308}, "out of range"),
        ({"init_factor": float("inf")}, "init_factor above 0"),
        ({"init_factor": 0.0}, "init_factor above 0"),
        ({"momentum": 0.0}, "momentum in"),
    ],
)
def test_bad_constants(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UnknownAwareLoss(**options)  # type: ignore[arg-type]


def test_bad_batches() -> None:
    values, target = logits()
    criterion = UnknownAwareLoss()
    with pytest.raises(UsageError, match=r"not \[32, 6\] and \[31\]"):
        criterion(values, target[1:])
    with pytest.raises(UsageError, match=r"type int64, not torch\.int32"):
        criterion(torch.randn(32, 6), torch.zeros(32, dtype=torch.int32))
    with pytest.raises(UsageError, match=r"class indices of type int64, not torch\.float32"):
        criterion(values, target.float())
    with pytest.raises(UsageError, match="unknown_index 6 is outside the 6 logits"):
        UnknownAwareLoss(unknown_index=6)(values, target)
