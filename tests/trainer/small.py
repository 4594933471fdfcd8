"""A small network, its optimizers and a loop: what the tests of the sparsifier share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.trainer.sparsity.sparsifier import Sparsifier

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=draw), torch.randint(0, 5, (16,), generator=draw)


def backward(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    images, labels = batch(seed)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for seed in steps:
        backward(model, optimizer, seed)
        optimizer.step()


def make(optimizer: str = "sgd", **options: Any) -> tuple[nn.Sequential, Optimizer, Sparsifier]:
    model = small_model()
    optim = OPTIMIZERS[optimizer](model.parameters())
    settings: dict[str, Any] = {"density": 0.2, "interval": 5, "total_steps": 100, **options}
    return model, optim, Sparsifier(model, optim, **settings)


def snapshot(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    tensors = [*model.state_dict().values()]
    for state in optimizer.state.values():
        tensors += [v for v in state.values() if isinstance(v, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def inactive_tensors(model: nn.Module, optimizer: Optimizer, masks: dict[str, Tensor]) -> Tensor:
    """Everything kept for inactive weights: the weights and every same-shape state."""
    found = []
    for name, weight in model.named_parameters():
        if name in masks:
            kept = [weight.detach(), *optimizer.state[weight].values()]
            found += [t[~masks[name]] for t in kept if isinstance(t, Tensor) and t.ndim > 1]
    return torch.cat(found)


def scaled(model: nn.Module, optimizer: Optimizer, scaler: Any, seed: int, bad: bool) -> None:
    images, labels = batch(seed)
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
    if bad:
        grad = model.get_parameter("4.weight").grad
        assert grad is not None
        grad.view(-1)[::7] = float("inf")
        grad.view(-1)[1::7] = float("nan")
