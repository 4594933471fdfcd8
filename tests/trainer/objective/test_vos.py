from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.models import build
from moon.trainer.objective.vos import HeadInput, VirtualOutliers


def small(**options: Any) -> VirtualOutliers:
    settings: dict[str, Any] = {"known": 3, "features": 4, "queue": 5, "warmup_epochs": 1,
                                "sample_from": 50, **options}  # fmt: skip
    return VirtualOutliers(**settings)


def some(seed: int, rows: int = 20, features: int = 4, known: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, known, (rows,), generator=draw)
    return torch.randn(rows, features, generator=draw) + 3 * labels[:, None], labels


def filled(seed: int = 0, **options: Any) -> VirtualOutliers:
    vos = small(**options)
    features, labels = some(seed, rows=60)
    vos(features, torch.zeros(60, 3 + (vos.unknown_index is not None)), labels, nn.Identity())
    vos.start_epoch(2)
    assert vos.active
    return vos


def remembered(vos: VirtualOutliers, index: int) -> list[float]:
    """What the queue of a class holds, without regard to order."""
    count = int(vos.filled_K[index])
    return sorted(vos.queue_KQD[index, :, 0].tolist()[:count])


def test_queues_by_hand() -> None:
    vos = small(known=2, features=1, queue=3)
    zero = torch.zeros(4, 2)

    def see(values: list[float], labels: list[int]) -> None:
        vos(torch.tensor(values)[:, None], zero[: len(labels)], torch.tensor(labels), nn.Identity())

    see([1, 2, 3], [0, 1, 0])
    assert (remembered(vos, 0), remembered(vos, 1)) == ([1, 3], [2])
    assert vos.filled_K.tolist() == [2, 1] and not vos.full
    see([4, 5], [0, 0])  # The oldest, 1, goes.
    assert remembered(vos, 0) == [3, 4, 5]
    see([6, 7, 8, 9], [1, 1, 1, 1])  # More than fit: the last three stay.
    assert remembered(vos, 1) == [7, 8, 9] and vos.full
    vos.eval()
    see([0, 0], [0, 1])
    assert (remembered(vos, 0), remembered(vos, 1)) == ([3, 4, 5], [7, 8, 9])


@given(st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=6), st.integers(1, 7))
def test_queues_hold_the_last_of_each_class(batches: list[list[int]], queue: int) -> None:
    vos = small(features=1, queue=queue)
    seen: dict[int, list[float]] = {0: [], 1: [], 2: []}
    count = 0.0
    for labels in batches:
        values = [count + 1 + i for i in range(len(labels))]
        count += len(labels)
        for value, label in zip(values, labels, strict=True):
            seen[label].append(value)
        vos(
            torch.tensor(values).reshape(-1, 1),
            torch.zeros(len(labels), 3),
            torch.tensor(labels, dtype=torch.int64),
            nn.Identity(),
        )
    for label, values in seen.items():
        assert remembered(vos, label) == values[-queue:]


def test_no_place_is_written_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which of two writes to one place wins is not determined on a GPU.
    plain = torch.Tensor.index_copy_

    def checked(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        assert len(index.unique()) == len(index)
        return plain(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", checked)
    vos = small(queue=3)
    vos(torch.randn(10, 4), torch.zeros(10, 3), torch.ones(10).long(), nn.Identity())
    assert vos.filled_K.tolist() == [0, 3, 0]


def test_outliers_are_at_the_mean_plus_the_root_of_the_covariance() -> None:
    vos = filled()
    draw = torch.randn(3, 2, 4)
    means = torch.stack([vos.queue_KQD[k].mean(0) for k in range(3)])
    centred = torch.cat([vos.queue_KQD[k] - means[k] for k in range(3)]).double()
    covariance = centred.T @ centred / 15 + 1e-4 * torch.eye(4)
    root = torch.linalg.cholesky(covariance)
    for k in range(3):
        for s in range(2):
            expected = means[k] + root @ draw[k, s].double()
            assert torch.allclose(vos.outliers(draw)[k, s].double(), expected, atol=1e-5)


def test_likelihood_falls_with_the_length_of_the_draw_alone() -> None:
    vos = filled()
    draw = torch.randn(3, 30, 4)
    points = vos.outliers(draw).double()
    mean = vos.queue_KQD.mean(1).double()
    centred = (vos.queue_KQD - vos.queue_KQD.mean(1, keepdim=True)).flatten(0, 1).double()
    covariance = centred.T @ centred / 15 + 1e-4 * torch.eye(4)
    for k in range(3):
        normal = torch.distributions.MultivariateNormal(mean[k], covariance)
        likelihood = normal.log_prob(points[k])
        gap = likelihood + draw[k].double().square().sum(1) / 2
        assert gap.std() < 1e-3 * likelihood.std()


def test_draws_are_distributed_like_the_least_likely_of_many() -> None:
    # The largest of n chi-squared numbers has the n-th power of their distribution.
    vos = small(known=500, features=6, sample_from=40, select=2)
    draw = vos.draw(3)
    assert draw.shape == (500, 2, 6)
    squares = draw.square().sum(2)
    longest = squares.max(1).values.numpy()
    chi = stats.chi2(6)
    assert stats.kstest(longest, lambda x: chi.cdf(x) ** 40).pvalue > 1e-3
    second = squares.min(1).values.numpy()

    def cdf_of_second(x: Any) -> Any:
        return chi.cdf(x) ** 40 + 40 * chi.cdf(x) ** 39 * chi.sf(x)

    assert stats.kstest(second, cdf_of_second).pvalue > 1e-3
    directions = F.normalize(draw, dim=2).flatten(0, 1)
    assert directions.mean(0).abs().max() < 0.06
    assert torch.allclose(directions.T @ directions / 1000, torch.eye(6) / 6, atol=0.03)


def test_draws_depend_on_seed_and_step_alone() -> None:
    vos = small()
    first = vos.draw(1)
    torch.rand(3)
    assert torch.equal(first, vos.draw(1)) and torch.equal(first, small().draw(1))
    assert not torch.equal(first, vos.draw(2))
    assert not torch.equal(first, small(seed=1).draw(1))
    one, two = small(seed=3), small(seed=3)
    assert torch.equal(one.energy_weight_K, two.energy_weight_K)
    assert torch.equal(one.phi.weight, two.phi.weight)


def test_energy_by_hand() -> None:
    vos = small()
    with torch.no_grad():
        vos.energy_weight_K.copy_(torch.tensor([2.0, -1.0, 0.5]))
    p = torch.tensor([[0.1, 0.2, 0.7]])
    assert vos.energy(p.log()).item() == pytest.approx(math.log(2 * 0.1 + 0.5 * 0.7), rel=1e-6)
    wide = small(unknown_index=1)
    with torch.no_grad():
        wide.energy_weight_K.copy_(torch.tensor([2.0, 3.0, 0.5]))
    logits = torch.tensor([[0.1, 99.0, 0.2, 0.7]]).log()
    assert wide.energy(logits).item() == pytest.approx(math.log(0.2 + 0.6 + 0.35), rel=1e-6)


def test_the_loss_is_the_printed_formula_with_its_gradients() -> None:
    vos = filled(weight=0.3)
    head = nn.Linear(4, 3)
    features, labels = some(5, rows=6)
    draw = vos.draw(9)

    def naive() -> Tensor:
        # After the features have been remembered, as the loss does first.
        points = vos.outliers(draw).flatten(0, 1)
        w = F.relu(vos.energy_weight_K)
        inlier = torch.log((w * head(features).exp()).sum(1))
        outlier = torch.log((w * head(points).exp()).sum(1))
        slope = vos.phi.weight[1, 0] - vos.phi.weight[0, 0]
        shift = vos.phi.bias[1] - vos.phi.bias[0]
        each = torch.cat(
            [-F.logsigmoid(slope * inlier + shift), -F.logsigmoid(-slope * outlier - shift)]
        )
        return 0.3 * each.sum() / 9

    found = vos(features, head(features), labels, head, draw)
    expected = naive()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = [*head.parameters(), *vos.parameters()]
    assert len(list(vos.parameters())) == 3
    for one, two in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters),
        strict=True,
    ):  # fmt: skip
        assert one.abs().max() > 0
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_training_it_separates_the_energies() -> None:
    vos = filled(weight=1.0, queue=5)
    head = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([*head.parameters(), *vos.parameters()], lr=0.1)
    losses = []
    for step in range(150):
        features, labels = some(step, rows=30)
        loss = vos(features, head(features), labels, head, vos.draw(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_the_unknown_is_not_a_class() -> None:
    vos = small(unknown_index=0)
    features, labels = some(0)
    vos(features, torch.zeros(20, 4), labels + 1, nn.Identity())
    plain = small()
    plain(features, torch.zeros(20, 3), labels, nn.Identity())
    assert torch.equal(vos.queue_KQD, plain.queue_KQD)
    last = filled(unknown_index=-1)
    head = nn.Linear(4, 4)
    loss = last(features, head(features), labels, head, last.draw(1))
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert not slope[3].any() and slope[:3].any()


def test_when_it_begins() -> None:
    vos = small(warmup_epochs=2)
    features, labels = some(0, rows=60)
    logits = torch.randn(60, 3, requires_grad=True)
    vos.start_epoch(3)
    assert not vos.active  # Nothing is remembered yet.
    zero = vos(features, logits, labels, nn.Identity())
    assert zero.item() == 0 and zero.dtype is torch.float32
    for epoch, active in ((1, False), (2, False), (3, True), (4, True)):
        vos.start_epoch(epoch)
        assert vos.active is vos.branch is active
    with pytest.raises(TrainingError, match=r"draw\(step\)"):
        vos(features, logits, labels, nn.Identity())


def test_resume_is_bit_exact() -> None:
    def run(vos: VirtualOutliers, head: nn.Linear, epochs: range) -> list[float]:
        losses = []
        optimizer = torch.optim.SGD([*head.parameters(), *vos.parameters()], lr=0.1)
        for epoch in epochs:
            vos.start_epoch(epoch)
            for i in range(3):
                features, labels = some(10 * epoch + i)
                loss = vos(features, head(features), labels, head, vos.draw(10 * epoch + i))
                if loss.requires_grad:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                losses.append(loss.item())
        return losses

    def make() -> tuple[VirtualOutliers, nn.Linear]:
        torch.manual_seed(0)
        return small(warmup_epochs=1, queue=7), nn.Linear(4, 3)

    whole = run(*make(), range(1, 6))
    assert whole[-1] > 0
    for stop in (1, 3):
        vos, head = make()
        losses = run(vos, head, range(1, stop + 1))
        file = io.BytesIO()
        torch.save((vos.state_dict(), head.state_dict()), file)
        file.seek(0)
        other, other_head = make()
        saved, saved_head = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
        other_head.load_state_dict(saved_head)
        assert losses + run(other, other_head, range(stop + 1, 6)) == whole


def test_extreme_logits_and_features() -> None:
    vos = filled()
    head = nn.Linear(4, 3)
    with torch.no_grad():
        head.weight.mul_(1e4)
        vos.energy_weight_K.copy_(torch.tensor([-1.0, -1.0, -1.0]))
    features, labels = some(1)
    loss = vos(features, head(features), labels, head, vos.draw(1))
    loss.backward()
    assert loss.isfinite() and head.weight.grad is not None
    assert bool(head.weight.grad.isfinite().all())
    flat = small()  # All features alike: the ridge alone makes a covariance.
    flat(torch.ones(60, 4), torch.zeros(60, 3), torch.arange(60) % 3, nn.Identity())
    draw = flat.draw(1)
    assert torch.allclose(flat.outliers(draw), 1 + 0.01 * draw, atol=1e-5)


def test_low_precision_and_autocast() -> None:
    vos, head = filled(), nn.Linear(4, 3)
    features, labels = some(1)
    twin = copy.deepcopy(vos)
    exact = vos(features, head(features), labels, head, vos.draw(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = twin(features, head(features), labels, head, twin.draw(1))
    assert loss.dtype is torch.float32
    assert torch.equal(vos.queue_KQD, twin.queue_KQD)
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "wrn28-10"])
def test_features_before_the_head(name: str) -> None:
    model = build(name, outputs=5, size=(8, 8)) if name != "wrn28-10" else nn.Sequential(
        nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5)
    )  # fmt: skip
    head_input = HeadInput(model)
    with pytest.raises(TrainingError, match="not been run"):
        _ = head_input.features
    logits = model(torch.randn(3, 3, 8, 8))
    features = head_input.features
    assert features.shape == (3, head_input.layer.in_features) and features.requires_grad
    assert torch.equal(head_input.head(features), logits)
    assert torch.equal(head_input.head(features + 1) == logits, torch.zeros(3, 5).bool())
    assert head_input.features is features  # The second call went past the hook.
    head_input.remove()
    model(torch.randn(3, 3, 8, 8))
    with pytest.raises(TrainingError, match="not been run"):
        _ = head_input.features


def test_a_model_that_ends_in_a_convolution() -> None:
    with pytest.raises(UsageError, match="ends in Conv2d"):
        HeadInput(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()))


@pytest.mark.parametrize(
    "options",
    [{"queue": 0}, {"known": 0}, {"select": 0}, {"select": 51}, {"weight": -1.0},
     {"warmup_epochs": -1}],
)  # fmt: skip
def test_bad_constants(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"out of range|negative"):
        small(**options)


def test_bad_batches() -> None:
    vos = small()
    features, labels = some(0)
    message = r"features \[20, 4\] and logits \[20, 3\]"
    with pytest.raises(UsageError, match=message):
        vos(features[:, :3], torch.zeros(20, 3), labels, nn.Identity())
    with pytest.raises(UsageError, match=message):
        vos(features, torch.zeros(20, 4), labels, nn.Identity())
    with pytest.raises(UsageError, match="count from 1"):
        vos.start_epoch(-1)
