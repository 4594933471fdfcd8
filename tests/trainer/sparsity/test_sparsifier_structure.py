"""Structures and gradual pruning through a whole sparsifier."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.errors import TrainingError, UsageError
from moon.trainer.sparsity.selection import obeys
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.sparsity.structure import parse_structure
from tests.trainer.small import (
    OPTIMIZERS,
    backward,
    equal,
    inactive_tensors,
    make,
    scaled,
    snapshot,
    train,
)

STRUCTURES = ("unstructured", "2:4", "1:4", "block4x1", "fan-in")


def structured(name: str, optimizer: str = "sgd", **options: Any) -> Any:
    """The small model; its stem has one input channel and cannot be 2:4."""
    return make(optimizer, **{"structure": name, "dense": ("stem",), "density": 0.2, **options})


def check(sparsifier: Sparsifier, name: str) -> None:
    structure = parse_structure(name)
    for layer, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.nonzeros[layer] == sparsifier.targets[layer]
        assert obeys(mask, sparsifier.targets[layer], structure)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("rule", ["rigl", "set", "static"])
@pytest.mark.parametrize("exclude", [False, True])
def test_every_mask_has_the_structure(name: str, rule: str, exclude: bool) -> None:
    model, optimizer, sparsifier = structured(name, rule=rule, interval=1, exclude_dropped=exclude)
    first = {layer: mask.clone() for layer, mask in sparsifier.masks.items()}
    assert set(first) == {"4.weight", "6.weight"}
    check(sparsifier, name)
    for step in range(20):
        train(model, optimizer, range(step, step + 1))
        check(sparsifier, name)
        assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0
    moved = any(not torch.equal(first[layer], mask) for layer, mask in sparsifier.masks.items())
    assert moved == (rule != "static")


def test_2_of_4_in_full_with_a_dense_stem() -> None:
    model, optimizer, sparsifier = structured("2:4", density=0.5, interval=1)
    assert sparsifier.densities == {"0.weight": 1.0, "4.weight": 0.5, "6.weight": 0.5}
    before = sparsifier.masks["4.weight"].clone()
    train(model, optimizer, range(10))
    for mask in sparsifier.masks.values():
        assert set(mask.view(len(mask), -1, 4).sum(2).flatten().tolist()) == {2}
    assert not torch.equal(before, sparsifier.masks["4.weight"])


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("rule", ["rigl", "gmp"])
@pytest.mark.parametrize("optimizer", ["sgd", "amsgrad"])
def test_poisoned_storage_never_shows(name: str, rule: str, optimizer: str) -> None:
    model, optim, sparsifier = structured(name, optimizer, rule=rule, interval=4)
    train(model, optim, range(8))
    before = {layer: mask.clone() for layer, mask in sparsifier.masks.items()}
    backward(model, optim, 8)
    for layer, mask in before.items():
        weight = model.get_parameter(layer)
        for tensor in (weight.data, *optim.state[weight].values()):
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                tensor[~mask] = 7.0
    sparsifier.mask_gradients()
    assert sparsifier.update_count == 2
    for layer, mask in sparsifier.masks.items():
        weight = model.get_parameter(layer)
        slots = [t for t in optim.state[weight].values() if isinstance(t, Tensor) and t.ndim > 1]
        for tensor in (weight, *slots):
            assert int(torch.count_nonzero(tensor[mask & ~before[layer]])) == 0
            assert int(torch.count_nonzero(tensor[~mask])) == 0
        assert bool((mask & ~before[layer]).any()) == (rule == "rigl")


@pytest.mark.parametrize("name", ["2:4", "block4x1", "fan-in"])
def test_first_masks_by_magnitude_have_the_structure(name: str) -> None:
    _, _, sparsifier = structured(name, init="magnitude")
    check(sparsifier, name)


def test_infinite_gradients_of_inactive_weights_do_not_survive() -> None:
    model, optimizer, sparsifier = make()
    train(model, optimizer, range(2))
    for bad in (float("inf"), float("-inf"), float("nan")):
        backward(model, optimizer, 2)
        for layer, mask in sparsifier.masks.items():
            gradient = model.get_parameter(layer).grad
            kept = gradient[mask].clone()
            gradient[~mask] = bad
            sparsifier.mask_gradients()
            assert torch.equal(gradient[mask], kept)
            assert int(torch.count_nonzero(gradient[~mask])) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gradients_of_any_width_are_masked(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8).to(dtype)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.3)
    model.weight.grad = torch.full((8, 8), float("inf"), dtype=dtype)
    model.weight.grad[sparsifier.masks["weight"]] = 1.5
    sparsifier.mask_gradients()
    assert torch.equal(model.weight.grad, 1.5 * sparsifier.masks["weight"].to(dtype))


# ---------------------------------------------------------------- pruning


def test_gradual_pruning_follows_its_schedule_by_hand() -> None:
    # 200 weights to 40 over 10 steps: after 4, 8 and, though no multiple, 10 steps are left
    # 40 + 160 * (1 - t / 10)^3 = 74.56, 41.28, 40.
    model = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(
        model, optimizer, density=0.2, rule="gmp", interval=4, total_steps=20, stop=0.5
    )
    assert sparsifier.targets == {"weight": 40} and sparsifier.density == 1.0
    seen = []
    for step in range(12):
        assert sparsifier.frozen == (step > 10)
        before = model.weight.detach().clone()
        old = sparsifier.masks["weight"].clone()
        optimizer.zero_grad()
        model(torch.randn(5, 20)).square().sum().backward()
        sparsifier.mask_gradients()
        mask = sparsifier.masks["weight"]
        assert not bool((mask & ~old).any())
        if bool((old & ~mask).any()):
            assert float(before[mask].abs().min()) >= float(before[old & ~mask].abs().max())
        optimizer.step()
        seen.append(sparsifier.nonzeros["weight"])
    assert seen == [200] * 4 + [75] * 4 + [41] * 2 + [40] * 2
    assert sparsifier.update_count == 3 and sparsifier.turnover == 0.0


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_gradual_pruning_ends_in_the_structure(name: str, interval: int) -> None:
    model, optimizer, sparsifier = structured(
        name, rule="gmp", interval=interval, total_steps=30, stop=0.5
    )
    assert sparsifier.density == 1.0 and not sparsifier.frozen
    counts = []
    for step in range(18):
        train(model, optimizer, range(step, step + 1))
        counts.append(sum(sparsifier.nonzeros.values()))
        assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0
    assert counts == sorted(counts, reverse=True)
    assert sparsifier.frozen and sparsifier.nonzeros == sparsifier.targets
    check(sparsifier, name)


def test_freezing_prunes_to_the_end_at_once() -> None:
    model, optimizer, sparsifier = structured("2:4", rule="gmp", total_steps=100)
    train(model, optimizer, range(7))
    assert sparsifier.density > 0.2
    sparsifier.freeze()
    check(sparsifier, "2:4")
    assert sparsifier.frozen and sparsifier.update_count == 2
    train(model, optimizer, range(7, 30))
    check(sparsifier, "2:4")
    sparsifier.freeze()
    assert sparsifier.update_count == 2


def test_pruning_lands_though_the_gradients_at_the_end_are_not_finite() -> None:
    model, optimizer, sparsifier = make(
        "fused sgd", rule="gmp", interval=4, total_steps=8, stop=1.0
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(10):
        scaled(model, optimizer, scaler, step, bad=step >= 8)
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.frozen and sparsifier.nonzeros == sparsifier.targets
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_last_update_that_a_replayed_graph_ran_past_is_made_up_for() -> None:
    model, optimizer, sparsifier = make(rule="gmp", interval=10, total_steps=20, stop=0.5)
    train(model, optimizer, range(2))
    sparsifier.advance(15)
    assert sparsifier.update_due and not sparsifier.frozen
    train(model, optimizer, range(2, 3))
    assert sparsifier.frozen and sparsifier.nonzeros == sparsifier.targets


@pytest.mark.parametrize("name", ["unstructured", "2:4", "block4x1", "fan-in"])
@pytest.mark.parametrize("rule", ["gmp", "set", "rigl"])
def test_resume_is_bit_exact(name: str, rule: str) -> None:
    def run(steps: range, trio: tuple[nn.Module, Optimizer, Sparsifier]) -> None:
        train(trio[0], trio[1], steps)

    options: dict[str, Any] = {"rule": rule, "interval": 3, "total_steps": 24}
    whole = structured(name, **options)
    run(range(20), whole)
    first = structured(name, **options)
    run(range(8), first)
    states = copy.deepcopy([part.state_dict() for part in first])
    again = structured(name, **options)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    assert again[2].nonzeros == first[2].nonzeros
    run(range(8, 20), again)
    assert equal(snapshot(*whole[:2]), snapshot(*again[:2]))
    assert equal(list(whole[2].masks.values()), list(again[2].masks.values()))
    check(again[2], name)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "2:4"}, r"0 has 1 input channel, fewer than 4.*dense=\['stem'\]"),
        ({"structure": "0:4"}, r"unknown structure '0:4'.*unstructured, N:M such as 2:4"),
        ({"structure": "blocks"}, "unknown structure 'blocks'"),
        (
            {"structure": "2:4", "dense": ("stem",), "density": 0.7},
            r"at most 0\.506, a sparsity of at least 0\.494\.",
        ),
        (
            {"density": 1e-5},
            r"density 1e-05 is 0\.05932 connections, and 3 layers need .*least 0\.0005058",
        ),
        ({"rule": "gmp", "total_steps": None}, "total_steps is not given"),
        ({"rule": "gmp", "exclude_dropped": True}, "gmp never grows a connection back"),
        (
            {"structure": "fan-in", "density": 0.001},
            "3 layers need at least 33 with the structure fan-in",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**options)


def test_a_model_without_prunable_layers_is_refused() -> None:
    model = nn.BatchNorm1d(4)
    with pytest.raises(UsageError, match="BatchNorm1d has no Conv or Linear layer"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)


def test_a_dense_run_has_no_structure() -> None:
    assert make(rule="dense", density=1.0, structure="2:4")[2].masks == {}


def test_states_of_another_structure_are_refused() -> None:
    saved = structured("2:4", density=0.1)[2].state_dict()
    assert saved["structure"] == "2:4"
    with pytest.raises(TrainingError, match="saved with the structure 2:4, this run has fan-in"):
        structured("fan-in", density=0.1)[2].load_state_dict(saved)
    _, _, plain = structured("unstructured", density=0.1)
    forged = {**plain.state_dict(), "structure": "2:4"}
    with pytest.raises(TrainingError, match=r"mask of 4\.weight does not have the structure 2:4"):
        structured("2:4", density=0.1)[2].load_state_dict(forged)
    # States written before there were structures are unstructured.
    old = plain.state_dict()
    del old["structure"]
    plain.load_state_dict(old)
    with pytest.raises(TrainingError, match="saved with the structure unstructured"):
        structured("2:4", density=0.1)[2].load_state_dict(old)


def test_a_pruning_state_with_too_few_connections_is_refused() -> None:
    _, _, sparsifier = make(rule="gmp")
    state = sparsifier.state_dict()
    state["masks"]["4.weight"].zero_()
    with pytest.raises(TrainingError, match=r"the model needs \(20, 288\) and at least \d+"):
        sparsifier.load_state_dict(state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_blocks_with_every_optimizer(optimizer: str) -> None:
    model, optim, sparsifier = structured("block4x1", optimizer)
    train(model, optim, range(12))
    check(sparsifier, "block4x1")
    assert int(torch.count_nonzero(inactive_tensors(model, optim, sparsifier.masks))) == 0


def test_pruning_without_time_is_done_at_the_first_step() -> None:
    model, optimizer, sparsifier = make(rule="gmp", total_steps=10, stop=0.0)
    assert sparsifier.density == 1.0 and sparsifier.update_due
    train(model, optimizer, range(1))
    assert sparsifier.frozen and sparsifier.nonzeros == sparsifier.targets
