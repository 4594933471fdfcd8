from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.objective.dropconnect import DropConnect
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.sparsity.topology import Topology, generator
from moon.trainer.voting import Votes
from tests.trainer.small import batch, make, small_model

RATE = 0.25


def bits(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone().view(torch.int32) for weight in model.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def sparse() -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier, DropConnect]:
    model, optimizer, sparsifier = make(dense=["0"])
    return model, optimizer, sparsifier, DropConnect(model, sparsifier.masks, rate=RATE, seed=7)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    images, labels = batch(seed)
    return nn.functional.cross_entropy(model(images), labels)


def test_it_zeroes_a_share_of_the_active_weights_and_puts_back_the_same_bits() -> None:
    model, _, sparsifier, drop = sparse()
    with torch.no_grad():
        active = sparsifier.masks["4.weight"].nonzero()
        for i, odd in enumerate((-0.0, float("nan"), float("inf"), 1e-42)):
            model[4].weight[tuple(active[i])] = odd
    before, old = bits(model), copy.deepcopy(model)
    drop.draw(3)
    with drop.applied():
        for index in (0, 4, 6):
            weight, was = model[index].weight, old[index].weight
            mask = sparsifier.masks.get(f"{index}.weight", torch.ones_like(weight).bool())
            gone = mask & (weight == 0)
            share = (gone.sum() / mask.sum()).item()
            assert share == pytest.approx(RATE, abs=4 * (RATE * 0.75 / int(mask.sum())) ** 0.5)
            assert torch.equal(weight[~gone].view(torch.int32), was[~gone].view(torch.int32))
            assert not weight[~mask].any()
            assert torch.equal(model[index].bias, old[index].bias)
        assert same(bits(model[1]), bits(old[1]))
    assert same(bits(model), before)


def test_one_step_by_hand() -> None:
    # loss = w . x, so the gradient is x; the dropped weight counts for nothing and gets none.
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 4.0]]))
    mask = torch.tensor([[True, True, False, True]])
    drop = DropConnect(model, {"weight": mask}, rate=0.5, seed=0)
    draws = torch.rand(3, generator=generator(0, 5, "dropconnect/weight"))
    x = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    factor = torch.ones(4)
    factor[[0, 1, 3]] = (draws >= 0.5).float()
    assert 0 < factor.sum() < 4
    drop.draw(5)
    with drop.training_step():
        loss = model(x).sum()
        loss.backward()
    assert loss.item() == (factor * model.weight[0] * x[0]).sum().item()
    assert model.weight.grad is not None
    # Outside the mask the gradient stays dense: the topology grows by it.
    assert model.weight.grad[0].tolist() == (factor * x[0]).tolist()
    assert model.weight.tolist() == [[1.0, 2.0, 0.0, 4.0]]


def test_the_gradient_is_that_of_the_thinned_model() -> None:
    model, _, _, drop = sparse()
    thinned = copy.deepcopy(model)
    drop.draw(2)
    with drop.applied():
        thinned.load_state_dict(model.state_dict())
        gone = {index: model[index].weight == 0 for index in (0, 4, 6)}
    drop.draw(2)
    with drop.training_step():
        loss = loss_of(model)
        loss.backward()
    expected = loss_of(thinned)
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, one), two in zip(model.named_parameters(), thinned.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        masks = drop._masks
        away = torch.zeros_like(one).bool()
        if name.endswith(".weight") and int(name[0]) in gone:
            active = masks.get(name, torch.ones_like(away))
            away = gone[int(name[0])] & active
            assert away.any()
        assert torch.equal(one.grad, two.grad.masked_fill(away, 0.0)), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_keep_the_topology_and_follow_its_updates(channels_last: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1),
                          nn.Flatten(), nn.Linear(288, 5))  # fmt: skip
    if channels_last:
        model.to(memory_format=torch.channels_last)
        assert not model[2].weight.is_contiguous()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    sparsifier = Sparsifier(model, optimizer, density=0.6, distribution="uniform", interval=2,
                            total_steps=20)  # fmt: skip
    drop = DropConnect(model, sparsifier.masks, rate=RATE)
    shares = []
    for step in range(12):
        optimizer.zero_grad()
        before = bits(model)
        drop.draw(step)
        with drop.training_step():
            # Grown weights are zero to begin with: those that are not tell who was dropped.
            gone = (model[2].weight == 0) & (before[2].view(torch.float32) != 0)
            shares.append((gone.sum() / sparsifier.masks["2.weight"].sum()).item())
            loss_of(model, step).backward()
        assert same(bits(model), before)
        gradient = model[2].weight.grad
        assert gradient is not None and not gradient[gone].any()
        assert gradient[~sparsifier.masks["2.weight"]].any()
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    assert sparsifier.update_count > 3
    assert 0.21 < sum(shares) / 12 < 0.29


def test_a_gradient_of_another_layout() -> None:
    model = nn.Conv2d(3, 8, 3)
    drop = DropConnect(model, rate=0.5)
    drop.draw(1)
    with drop.training_step():
        gone = model.weight == 0
        model.weight.grad = torch.ones_like(model.weight).contiguous(
            memory_format=torch.channels_last
        )
    assert model.weight.grad.stride() != model.weight.stride()
    assert torch.equal(model.weight.grad == 0, gone)


def test_a_weight_inside_a_larger_tensor() -> None:
    whole = torch.ones(20, 4)
    model = nn.Linear(4, 5)
    model.weight = nn.Parameter(whole[10:15])
    drop = DropConnect(model, rate=0.5)
    drop.draw(1)
    with drop.applied():
        assert 0 < int((whole == 0).sum()) == int((model.weight == 0).sum()) < 20
    assert bool((whole == 1).all())


def test_draws_depend_on_seed_step_and_layer_alone() -> None:
    def gone(seed: int, step: int, repeats: int = 1) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
        drop = DropConnect(model, rate=0.5, seed=seed)
        for _ in range(repeats):
            drop.draw(step)
            with drop.applied():
                found = [layer.weight == 0 for layer in model]
        return found

    first = gone(0, 1)
    assert same(first, gone(0, 1, repeats=3))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], gone(0, 2)[0])
    assert not torch.equal(first[0], gone(1, 1)[0])


def test_an_epochs_vote_has_the_last_steps_mask() -> None:
    model, optimizer, sparsifier, drop = sparse()
    sparsifier.freeze()
    votes = Votes()
    expected = torch.zeros_like(model[4].weight)
    for step in range(4):
        optimizer.zero_grad()
        drop.draw(step)
        with drop.training_step():
            kept = model[4].weight != 0
            loss_of(model, step).backward()
        optimizer.step()
        expected += model[4].weight.detach() * kept / 4
        with drop.applied():
            votes.add(model, sparsifier.masks)
    assert torch.allclose(votes.average()["4.weight"].float(), expected, atol=1e-7)


def test_rate_zero_changes_nothing() -> None:
    model = small_model()
    drop = DropConnect(model, rate=0.0)
    drop.draw(1)
    with drop.training_step():
        loss = loss_of(model)
        loss.backward()
    assert torch.equal(loss, loss_of(model))
    assert model[4].weight.grad is not None and (model[4].weight.grad != 0).all(1).any()


def test_an_error_inside_leaves_the_weights_whole() -> None:
    model, _, _, drop = sparse()
    before = bits(model)
    drop.draw(1)
    with pytest.raises(ZeroDivisionError), drop.training_step():
        raise ZeroDivisionError
    assert same(bits(model), before)
    with drop.applied(), pytest.raises(TrainingError, match="already dropped"), drop.applied():
        pass
    assert same(bits(model), before)
    drop.draw(2)
    with drop.applied():
        pass


def test_blocks_without_a_draw() -> None:
    _, _, _, drop = sparse()
    with pytest.raises(TrainingError, match=r"Call draw\(step\) first"), drop.applied():
        pass


def test_what_is_drawn_stays_where_it_is_in_memory() -> None:
    _, _, sparsifier, drop = sparse()
    drop.draw(1)
    layer = drop._layers[1]
    assert layer.positions is not None and layer.dropped is not None
    places = layer.positions.data_ptr(), layer.dropped.data_ptr()
    dropped = layer.dropped.clone()
    mask = sparsifier.masks["4.weight"]
    mask.copy_(mask.flatten().roll(1).view_as(mask))
    drop.draw(2)
    assert not torch.equal(layer.dropped, dropped)
    assert (layer.positions.data_ptr(), layer.dropped.data_ptr()) == places
    assert torch.equal(layer.positions, mask.flatten().nonzero().flatten())


def test_a_backward_pass_outside_is_refused() -> None:
    model, _, _, drop = sparse()
    drop.draw(1)
    with drop.training_step():
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(UsageError, match="rate of dropped connections"):
        DropConnect(small_model(), rate=rate)


def test_masks_of_another_model() -> None:
    wrong: Topology = {"4.weight": torch.ones(2, 2).bool()}
    with pytest.raises(UsageError, match=r"no layer 4\.weight of shape \[2, 2\]"):
        DropConnect(small_model(), wrong)
    with pytest.raises(UsageError, match="no layer nowhere"):
        DropConnect(small_model(), {"nowhere": torch.ones(1).bool()})
