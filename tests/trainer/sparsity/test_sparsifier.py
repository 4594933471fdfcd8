from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moon.errors import UsageError
from moon.trainer.sparsity.sparsifier import Sparsifier
from tests.trainer.small import (
    OPTIMIZERS,
    backward,
    equal,
    inactive_tensors,
    make,
    small_model,
    snapshot,
    train,
)


def test_masks_at_construction() -> None:
    model, _, sparsifier = make()
    total = sum(m.weight.numel() for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    for name, mask in sparsifier.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert int(mask.sum()) == sparsifier.nonzeros[name]
    assert abs(sum(sparsifier.nonzeros.values()) - 0.2 * total) <= 3
    assert sparsifier.density == pytest.approx(0.2, abs=0.001)
    assert set(sparsifier.densities) == {"0.weight", "4.weight", "6.weight"}


def test_the_model_gains_nothing() -> None:
    keys = list(small_model().state_dict())
    model, optimizer, _ = make()
    train(model, optimizer, range(12))
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks


def test_magnitude_masks_keep_a_trained_models_largest_weights() -> None:
    before = small_model()[4].weight.detach().abs()
    model, _, sparsifier = make(init="magnitude")
    mask = sparsifier.masks["4.weight"]
    assert float(before[mask].min()) >= float(before[~mask].max())
    assert torch.equal(model[4].weight != 0, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density must be above 0"),
        ({"rule": "rigel"}, r"unknown rule 'rigel'.*dense, static, set, rigl"),
        ({"structure": "4:2"}, r"unknown structure '4:2'.*unstructured"),
        ({"init": "ones"}, r"unknown init 'ones'"),
        ({"distribution": "erdos"}, "unknown distribution"),
        ({"dense": ("conv9",)}, "the layer 'conv9'"),
        ({"rule": "dense"}, r"rule dense keeps every weight, but density is 0\.2"),
        ({"interval": 0}, "interval is a whole number"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**options)


def test_an_optimizer_that_does_not_train_a_layer_is_refused() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model[4:].parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"does not train 0\.weight"):
        Sparsifier(model, optimizer, density=0.2)
    Sparsifier(model, optimizer, density=0.2, dense=("stem",))


def test_only_a_torch_optimizer_will_do() -> None:
    with pytest.raises(UsageError, match=r"is a dict, not a torch\.optim\.Optimizer"):
        Sparsifier(small_model(), {}, density=0.2)  # type: ignore[arg-type]


def test_one_sparsifier_an_optimizer() -> None:
    model, optimizer, first = make()
    with pytest.raises(UsageError, match="already has a Sparsifier"):
        Sparsifier(model, optimizer, density=0.2)
    first.remove()
    second = Sparsifier(model, optimizer, density=0.1)
    train(model, optimizer, range(3))
    assert first.step_count == 0 and second.step_count == 3


@pytest.mark.parametrize("rule", ["rigl", "dense"])
def test_density_one_is_the_dense_run(rule: str) -> None:
    plain = small_model()
    plain_optimizer = OPTIMIZERS["sgd"](plain.parameters())
    train(plain, plain_optimizer, range(12))
    model, optimizer, sparsifier = make(density=1.0, rule=rule)
    train(model, optimizer, range(12))
    assert sparsifier.masks == {} and sparsifier.density == 1.0 and sparsifier.frozen
    assert sparsifier.step_count == 12 and sparsifier.turnover == 0.0
    assert equal(snapshot(plain, plain_optimizer), snapshot(model, optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_inactive_weights_and_state_stay_zero(optimizer: str) -> None:
    model, optim, sparsifier = make(optimizer)
    train(model, optim, range(23))
    assert sparsifier.update_count == 4 and 0 < sparsifier.turnover < 4 * 0.3
    assert int(torch.count_nonzero(inactive_tensors(model, optim, sparsifier.masks))) == 0


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_counts_are_exact_through_a_thousand_updates(rule: str) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, density=0.3, rule=rule, interval=1)
    images, labels = torch.randn(8, 12), torch.randint(0, 4, (8,))
    for _ in range(1001):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            assert int(mask.sum()) == sparsifier.nonzeros[name]
            assert not bool((model.get_parameter(name)[~mask] != 0).any())
    assert sparsifier.update_count == 1000


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grown_weights_start_clean_though_their_storage_was_poisoned(optimizer: str) -> None:
    model, optim, sparsifier = make(optimizer, interval=4)
    train(model, optim, range(4))
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    backward(model, optim, 4)
    poisoned = 0
    for name, mask in before.items():
        weight = model.get_parameter(name)
        for tensor in (weight.data, *optim.state[weight].values()):
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                tensor[~mask] = 7.0
                poisoned += 1
    old = {name: model.get_parameter(name).detach().clone() for name in before}
    sparsifier.mask_gradients()
    grown_any = False
    for name, mask in sparsifier.masks.items():
        weight = model.get_parameter(name)
        grown = mask & ~before[name]
        grown_any |= bool(grown.any())
        slots = [t for t in optim.state[weight].values() if isinstance(t, Tensor) and t.ndim > 1]
        assert len(slots) >= 1
        for tensor in (weight, *slots):
            assert int(torch.count_nonzero(tensor[grown])) == 0
            assert int(torch.count_nonzero(tensor[~mask])) == 0
        stayed = mask & before[name]
        assert torch.equal(weight[stayed], old[name][stayed])
    assert grown_any and poisoned >= 6


def test_a_weight_that_is_dropped_and_regrows_keeps_value_and_state() -> None:
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sparsifier = Sparsifier(
        model, optimizer, density=4 / 6, distribution="uniform", interval=1, drop_fraction=0.5
    )
    state = sparsifier.state_dict()
    state["masks"]["0.weight"] = torch.tensor([[True, True, True, False, True, False]])
    sparsifier.load_state_dict(state)
    weight = model[0].weight
    weight.data = torch.tensor([[0.5, -0.1, 0.4, 0.0, 0.2, 0.0]])
    weight.grad = torch.zeros(1, 6)
    optimizer.step()
    optimizer.state[weight]["momentum_buffer"].copy_(torch.tensor([[1.0, 2, 3, 0, 5, 0]]))
    weight.grad = torch.tensor([[9.0, -1.0, 9.0, 0.7, 0.3, -0.9]])
    sparsifier.mask_gradients()
    # Kept: 0 and 2. Weights 1 and 4 are dropped; 1 regrows, 5 is new.
    assert sparsifier.masks["0.weight"].int().tolist() == [[1, 1, 1, 0, 0, 1]]
    assert weight.tolist() == [pytest.approx([0.5, -0.1, 0.4, 0.0, 0.0, 0.0])]
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[1, 2, 3, 0, 0, 0]]
    assert weight.grad.tolist() == [pytest.approx([9.0, -1.0, 9.0, 0.0, 0.0, -0.9])]
    assert sparsifier.turnover == 1 / 4


def test_an_all_zero_active_layer_keeps_its_count_and_trains() -> None:
    model, optimizer, sparsifier = make()
    with torch.no_grad():
        model[4].weight.zero_()
    train(model, optimizer, range(6))
    assert sparsifier.update_count == 1
    assert int(sparsifier.masks["4.weight"].sum()) == sparsifier.nonzeros["4.weight"]
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0
    assert bool((model[4].weight != 0).any())


def test_the_update_reads_the_accumulated_gradient() -> None:
    # Two micro-batches with opposite gradients: the mean is zero there, and nothing else grows.
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimizer, density=0.5, interval=1, drop_fraction=0.5)
    state = sparsifier.state_dict()
    state["masks"]["weight"] = torch.tensor([[True, True, False, False]])
    sparsifier.load_state_dict(state)
    model.weight.data = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    for step in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[0.0, 0.0, 10.0, 1.0]])).sum().backward()
        model(torch.tensor([[0.0, 0.0, -10.0, 1.0]])).sum().backward()
        optimizer.step()
        assert sparsifier.update_count == step
    assert sparsifier.masks["weight"].tolist() == [[True, False, False, True]]


def test_the_topology_stops_and_freezes() -> None:
    model, optimizer, sparsifier = make(interval=2, total_steps=20, stop=0.5)
    train(model, optimizer, range(10))
    assert sparsifier.frozen and sparsifier.update_count == 4
    still = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    train(model, optimizer, range(10, 30))
    assert all(torch.equal(still[name], mask) for name, mask in sparsifier.masks.items())

    model, optimizer, sparsifier = make(interval=2, total_steps=None)
    train(model, optimizer, range(9))
    assert sparsifier.update_count == 4 and not sparsifier.frozen
    sparsifier.freeze()
    train(model, optimizer, range(9, 20))
    assert sparsifier.update_count == 4 and sparsifier.frozen and sparsifier.step_count == 20


def test_static_masks_never_move() -> None:
    model, optimizer, sparsifier = make(rule="static")
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    train(model, optimizer, range(15))
    assert all(torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    assert sparsifier.frozen and sparsifier.turnover == 0.0


def test_only_the_seed_matters() -> None:
    runs = []
    for seed, disturb in ((0, False), (0, True), (1, False)):
        model, optimizer, sparsifier = make(rule="set", seed=seed)
        for step in range(12):
            if disturb:
                torch.rand(step)
            backward(model, optimizer, step)
            optimizer.step()
        runs.append(list(sparsifier.masks.values()))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_exclude_dropped_reaches_the_rule() -> None:
    model, optimizer, sparsifier = make(exclude_dropped=True, interval=3)
    train(model, optimizer, range(3))
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    backward(model, optimizer, 3)
    fraction = sparsifier.schedule.fraction(3)
    optimizer.step()
    for name, mask in sparsifier.masks.items():
        active = sparsifier.nonzeros[name]
        room = mask.numel() - active
        assert int((mask & ~before[name]).sum()) == min(int(fraction * active), room)


def test_masking_by_hand_before_clipping_is_idempotent_with_the_hook() -> None:
    results = []
    for by_hand in (0, 1, 3):
        model, optimizer, sparsifier = make()
        for step in range(12):
            backward(model, optimizer, step)
            for _ in range(by_hand):
                sparsifier.mask_gradients()
            optimizer.step()
        assert sparsifier.update_count == 2 and sparsifier.step_count == 12
        results.append(snapshot(model, optimizer))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_clipping_sees_only_active_gradients() -> None:
    model, optimizer, sparsifier = make()
    backward(model, optimizer, 0)
    dense_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    sparsifier.mask_gradients()
    sparse_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert sparse_norm < dense_norm
    kept = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert equal(kept, [p.grad for p in model.parameters() if p.grad is not None])


def test_bernoulli_masks_vary_in_number_and_then_stay() -> None:
    counts = set()
    for seed in range(5):
        model, optimizer, sparsifier = make(init="bernoulli", seed=seed, density=0.2)
        first = sparsifier.nonzeros
        counts.add(tuple(first.values()))
        assert sum(first.values()) == pytest.approx(0.2 * 6252, rel=0.15)
        assert sparsifier.targets == first
        train(model, optimizer, range(12))
        assert sparsifier.update_count == 2
        assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == {
            n: first[n] for n in sparsifier.masks
        }
    assert len(counts) == 5
    with pytest.raises(UsageError, match="structure fan-in does not do"):
        make(init="bernoulli", structure="fan-in")
    with pytest.raises(UsageError, match="rule gmp does not do"):
        make(init="bernoulli", rule="gmp")
