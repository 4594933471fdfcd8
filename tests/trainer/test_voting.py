from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from moon.errors import TrainingError
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.voting import Votes, recompute_batch_norm
from tests.trainer.small import make, small_model, train


def test_the_average_is_uniform() -> None:
    model = nn.Linear(3, 2)
    votes = Votes()
    seen = []
    for seed in range(7):
        torch.manual_seed(seed)
        nn.init.normal_(model.weight)
        votes.add(model)
        seen.append(model.weight.detach().double())
    assert votes.count == 7
    assert torch.allclose(votes.average()["weight"], torch.stack(seen).mean(0), rtol=1e-14)
    votes.apply_(model)
    assert torch.equal(model.weight, torch.stack(seen).sum(0).div(7).float())


def test_one_vote_changes_nothing() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    votes = Votes()
    votes.add(model)
    votes.apply_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_average_keeps_exactly_the_final_mask() -> None:
    model, optimizer, sparsifier = make(total_steps=20, stop=0.5, interval=3)
    votes = Votes()
    for start in range(0, 20, 2):
        train(model, optimizer, range(start, start + 2))
        if start >= 10:
            assert sparsifier.frozen
            votes.add(model, sparsifier.masks)
    votes.apply_(model)
    assert votes.count == 5
    for name, mask in sparsifier.masks.items():
        outside = model.get_parameter(name)[~mask]
        assert int(torch.count_nonzero(outside)) == 0 and outside.numel() > 0


def test_a_weight_that_an_embedding_shares_is_averaged_under_its_mask() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(8, 20, bias=False))
    model[2].weight = model[0].weight
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.3)
    votes = Votes()
    votes.add(model, sparsifier.masks)
    votes.apply_(model)
    assert list(sparsifier.masks) == ["2.weight"]
    assert int(torch.count_nonzero(model[0].weight)) == 48


def test_a_topology_that_moves_between_votes_is_refused() -> None:
    model, optimizer, sparsifier = make(interval=1)
    train(model, optimizer, range(2))
    votes = Votes()
    votes.add(model, sparsifier.masks)
    train(model, optimizer, range(2, 4))
    with pytest.raises(TrainingError, match="topology changed between votes"):
        votes.add(model, sparsifier.masks)
    with pytest.raises(TrainingError, match="topology changed between votes"):
        votes.add(model)
    assert votes.count == 1


def test_weights_outside_the_mask_are_refused() -> None:
    model, _, sparsifier = make()
    with torch.no_grad():
        model[4].weight.fill_(1.0)
    with pytest.raises(TrainingError, match=r"4\.weight has nonzero weights outside its mask"):
        Votes().add(model, sparsifier.masks)


def test_a_vote_that_is_not_finite_is_refused() -> None:
    model = small_model()
    votes = Votes()
    votes.add(model)
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"0\.bias has weights that are NaN"):
        votes.add(model)
    assert votes.count == 1


def test_no_votes_and_foreign_votes() -> None:
    with pytest.raises(TrainingError, match="no votes to average"):
        Votes().average()
    votes = Votes()
    votes.add(nn.Linear(3, 2))
    with pytest.raises(TrainingError, match="parameters changed between votes"):
        votes.add(nn.Linear(3, 4))
    with pytest.raises(TrainingError, match="cast by another model"):
        votes.apply_(small_model())


def test_resume_is_bit_exact() -> None:
    model, optimizer, sparsifier = make(rule="static")
    votes, again = Votes(), Votes()
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        votes.add(model, sparsifier.masks)
        if step == 2:
            again.load_state_dict(copy.deepcopy(votes.state_dict()))
        elif step > 2:
            again.add(model, sparsifier.masks)
    one, two = votes.average(), again.average()
    assert again.count == 6 and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(TrainingError, match="version 0, not 2"):
        again.load_state_dict({"version": 0})


def test_later_training_does_not_reach_the_votes() -> None:
    model = nn.Linear(2, 1)
    votes = Votes()
    votes.add(model)
    kept = model.weight.detach().clone().double()
    saved = votes.state_dict()
    with torch.no_grad():
        model.weight.add_(1)
    votes.add(model)
    assert torch.equal(saved["sums"]["weight"], kept)


def norm_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.BatchNorm1d(6))


def test_batch_norm_takes_the_statistics_of_the_data() -> None:
    model = norm_model()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    data = torch.randn(50, 4) * 3 + 1
    assert recompute_batch_norm(model, [data[:20], data[20:40], data[40:]]) == 50
    hidden = model[0](data).detach()
    parts = [hidden[:20], hidden[20:40], hidden[40:]]
    shares = [20 / 50, 20 / 50, 10 / 50]
    assert norm.running_mean is not None and norm.running_var is not None
    assert torch.allclose(norm.running_mean, hidden.mean(0), atol=1e-5)
    expected = sum(s * p.var(0, unbiased=True) for s, p in zip(shares, parts, strict=True))
    assert isinstance(expected, Tensor)
    assert torch.allclose(norm.running_var, expected, rtol=1e-4)


def test_batch_norm_forgets_what_it_knew_and_dropout_stays_off() -> None:
    fresh, used = norm_model(), norm_model()
    for _ in range(5):
        used(torch.randn(8, 4) * 100)
    data = torch.randn(64, 4)
    for model in (fresh, used):
        recompute_batch_norm(model, [(data, None)])
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, used.state_dict()[name])
    # Without dropout the second norm sees unit variance (64/63 unbiased).
    second = used[3]
    assert isinstance(second, nn.BatchNorm1d) and second.running_var is not None
    assert torch.allclose(second.running_var, torch.full((6,), 64 / 63), atol=1e-3)


def test_modes_momenta_and_weights_are_left_as_found() -> None:
    model = norm_model()
    model.train()
    model[2].eval()
    weights = [p.detach().clone() for p in model.parameters()]
    recompute_batch_norm(model, [torch.randn(8, 4)])
    assert [m.training for m in model] == [True, True, False, True]
    assert [m.momentum for m in model if isinstance(m, nn.BatchNorm1d)] == [0.1, 0.1]
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))


def test_single_examples_are_left_out_and_none_is_an_error() -> None:
    model = norm_model()
    assert recompute_batch_norm(model, [torch.randn(8, 4), torch.randn(1, 4)]) == 8
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="at least one batch of two examples"):
        recompute_batch_norm(model, [torch.randn(1, 4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_batch_norm_reads_nothing() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    assert recompute_batch_norm(nn.Linear(2, 2), never()) == 0


def test_only_connections_are_kept() -> None:
    model, _, sparsifier = make(density=0.05)
    votes = Votes()
    votes.add(model, sparsifier.masks)
    state = votes.state_dict()
    for name, mask in sparsifier.masks.items():
        count = int(mask.sum())
        assert state["sums"][name].shape == (count,)
        assert state["positions"][name].dtype == torch.int32
        held = state["sums"][name].nbytes + state["positions"][name].nbytes
        assert held == 12 * count
    average = votes.average()
    for name, weight in model.named_parameters():
        assert torch.equal(average[name].float(), weight.detach()), name
