from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from moon.errors import TrainingError, UsageError
from moon.trainer.sparsity.sparsifier import Sparsifier
from tests.trainer.small import (
    OPTIMIZERS,
    backward,
    batch,
    equal,
    inactive_tensors,
    make,
    small_model,
    train,
)


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_a_layer_without_gradient_keeps_its_topology(rule: str) -> None:
    model, optimizer, sparsifier = make(rule=rule, interval=1)
    last = model[6].weight
    still = sparsifier.masks["6.weight"].clone()
    other = sparsifier.masks["4.weight"].clone()
    for step in range(4):
        backward(model, optimizer, step)
        last.grad = None
        optimizer.step()
    assert torch.equal(still, sparsifier.masks["6.weight"])
    assert not torch.equal(other, sparsifier.masks["4.weight"])


def test_a_closure_is_refused() -> None:
    _, optimizer, _ = make()
    with pytest.raises(TrainingError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TrainingError, match="closure"):
        optimizer.step(closure=lambda: 0.0)


def test_unknown_optimizer_state_is_refused() -> None:
    model = small_model()
    optimizer = torch.optim.Rprop(model.parameters())
    Sparsifier(model, optimizer, density=0.2)
    backward(model, optimizer, 0)
    with pytest.raises(TrainingError, match=r"Rprop keeps the state '\w+' for 0\.weight"):
        optimizer.step()


def test_unknown_optimizer_state_is_refused_at_construction() -> None:
    model = small_model()
    optimizer = torch.optim.Rprop(model.parameters())
    train(model, optimizer, range(1))
    with pytest.raises(TrainingError, match="Rprop keeps the state"):
        Sparsifier(model, optimizer, density=0.2)


def test_an_optimizer_that_mixes_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, density=0.3)
    model(torch.randn(5, 6)).sum().backward()
    with pytest.raises(TrainingError, match="Muon moved weights"):
        optimizer.step()


class _Late(torch.optim.Optimizer):
    """Mixes the weights of a layer from its second step on, as SOAP does."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for weight in self.param_groups[0]["params"] if self.steps > 1 else ():
            weight.add_(0.01)


def test_an_optimizer_that_mixes_weights_only_later_is_refused() -> None:
    model = small_model()
    optimizer = _Late(model.parameters(), {})
    Sparsifier(model, optimizer, density=0.3, rule="static")
    train(model, optimizer, range(1))
    with pytest.raises(TrainingError, match=r"_Late moved weights of 4\.weight"):
        train(model, optimizer, range(1, 2))


class _Child(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


def test_a_step_that_calls_its_parents_is_one_step() -> None:
    runs = []
    for kind in (torch.optim.SGD, _Child):
        model = small_model()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = Sparsifier(model, optimizer, density=0.2, interval=5, total_steps=100)
        train(model, optimizer, range(12))
        assert sparsifier.step_count == 12 and sparsifier.update_count == 2
        runs.append([*model.state_dict().values()])
    assert equal(*runs)


def test_optimizer_state_from_before_is_masked() -> None:
    model = small_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, range(3))
    sparsifier = Sparsifier(model, optimizer, density=0.2, init="magnitude")
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0


def test_a_dense_state_dict_loaded_before_the_first_step_is_masked() -> None:
    model, optimizer, sparsifier = make()
    model.load_state_dict(small_model(1).state_dict())
    train(model, optimizer, range(1))
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0


@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("what", ["model", "optimizer", "by hand"])
def test_whatever_else_writes_is_masked_at_the_next_step(what: str, steps: int) -> None:
    model, optimizer, sparsifier = make(rule="static")
    train(model, optimizer, range(steps))
    other = small_model(1)
    other_optimizer = OPTIMIZERS["sgd"](other.parameters())
    train(other, other_optimizer, range(2))
    if what == "model":
        model.load_state_dict(other.state_dict())
    elif what == "optimizer":
        optimizer.load_state_dict(other_optimizer.state_dict())
    else:
        with torch.no_grad():
            model[4].weight.fill_(7.0)
    train(model, optimizer, range(steps, steps + 1))
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0


def test_nothing_is_masked_twice_while_the_optimizer_alone_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, sparsifier = make()
    train(model, optimizer, range(4))
    calls: list[int] = []
    monkeypatch.setattr(sparsifier, "apply_masks", lambda: calls.append(sparsifier.step_count))
    for step in range(4, 21):
        backward(model, optimizer, step)
        sparsifier.mask_gradients()
        optimizer.step()
    # Where the optimizer is checked; the topology was updated at 5, 10, 15 and 20.
    assert sparsifier.update_count == 4 and calls == [8, 16]


def test_a_sparsifier_that_let_go_stays_so() -> None:
    model, optimizer, sparsifier = make()
    sparsifier.remove()
    again = Sparsifier(model, optimizer, density=0.2)
    sparsifier.remove()
    with pytest.raises(UsageError, match="already has a Sparsifier"):
        Sparsifier(model, optimizer, density=0.2)
    copied = copy.deepcopy(sparsifier)
    train(model, copied.optimizer, range(1))
    assert copied.step_count == 0
    again.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    Sparsifier(model, optimizer, density=0.2)


def test_channels_last_gives_the_same_run() -> None:
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = small_model().to(memory_format=layout)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = Sparsifier(model, optimizer, density=0.2, rule="set", interval=5)
        for mask, name in ((m, n) for n, m in sparsifier.masks.items()):
            assert mask.stride() == model.get_parameter(name).stride()
        train(model, optimizer, range(11))
        runs.append(list(sparsifier.masks.values()))
    assert equal(*runs)


def test_half_precision_weights() -> None:
    model = small_model().bfloat16()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, density=0.2, interval=2)
    for step in range(5):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.bfloat16()), labels).backward()
        optimizer.step()
    assert sparsifier.update_count == 2
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0
