from __future__ import annotations

import pytest
import torch
from torch import nn

from moon.errors import TrainingError
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


def test_a_layer_without_gradient_keeps_its_topology() -> None:
    model, optimizer, sparsifier = make(interval=1)
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
