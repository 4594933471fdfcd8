from __future__ import annotations

import pytest
import torch

from tests.trainer.small import (
    backward,
    equal,
    inactive_tensors,
    make,
    scaled,
    snapshot,
    train,
)


@pytest.mark.parametrize("bad_step", [4, 5, 6])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "fused sgd", "amsgrad", "fused adamw"])
def test_overflow_postpones_the_update_and_leaves_all_right(
    optimizer: str, unscale: bool, bad_step: int
) -> None:
    model, optim, sparsifier = make(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(9):
        before = snapshot(model, optim)
        masks = [mask.clone() for mask in sparsifier.masks.values()]
        updates = sparsifier.update_count
        scaled(model, optim, scaler, step, bad=step == bad_step)
        if unscale:
            scaler.unscale_(optim)
            sparsifier.mask_gradients()
        scaler.step(optim)
        scaler.update()
        if step == bad_step:
            after = snapshot(model, optim)
            # The forward pass has moved the batch-norm statistics; nothing else moved.
            names = list(model.state_dict())
            for i, (old, new) in enumerate(zip(before, after, strict=True)):
                norm = i < len(names) and names[i].startswith("1.")
                assert norm or torch.equal(old, new)
            assert equal(masks, list(sparsifier.masks.values()))
            assert sparsifier.update_count == updates
    assert sparsifier.update_count == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert int(torch.count_nonzero(inactive_tensors(model, optim, sparsifier.masks))) == 0


def test_an_update_waits_for_the_next_finite_step() -> None:
    model, optimizer, sparsifier = make("fused sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(9):
        assert sparsifier.update_due == (step in (5, 6, 7))
        scaled(model, optimizer, scaler, step, bad=step in (5, 6))
        scaler.step(optimizer)
        scaler.update()
        assert sparsifier.update_count == int(step >= 7)


def test_overflow_outside_the_sparse_layers_postpones_too() -> None:
    model, optimizer, sparsifier = make()
    for step in range(6):
        backward(model, optimizer, step)
        if step == 5:
            bias = model[0].bias
            assert bias is not None and bias.grad is not None
            bias.grad[0] = float("inf")
            sparsifier.mask_gradients()
            assert sparsifier.update_count == 0 and sparsifier.update_due
            return
        optimizer.step()
    raise AssertionError("the fifth step was not reached")


def test_huge_finite_gradients_are_no_overflow() -> None:
    model, optimizer, sparsifier = make(interval=1)
    for step in range(2):
        backward(model, optimizer, step)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0).add_(1e30)
        sparsifier.mask_gradients()
        if step == 0:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    assert sparsifier.update_count == 1


def test_an_overflow_that_only_the_scaler_knows_of_postpones_the_update() -> None:
    # Another rank's, say: the gradients here are finite, and the fused step moves nothing.
    model, optimizer, sparsifier = make("fused sgd")
    train(model, optimizer, range(5))
    backward(model, optimizer, 5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert equal(before, list(model.parameters()))
    assert sparsifier.update_count == 0 and sparsifier.update_due
    del optimizer.found_inf, optimizer.grad_scale
    train(model, optimizer, range(6, 7))
    assert sparsifier.update_count == 1


def test_a_first_step_that_overflows_leaves_no_state_behind() -> None:
    # torch's fused SGD makes its momentum with torch.empty, and then skips the step.
    model, optimizer, sparsifier = make("fused sgd")
    backward(model, optimizer, 0)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    # Deterministic algorithms fill what is empty with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0
