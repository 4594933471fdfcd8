from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from moon.errors import TrainingError
from moon.trainer.sparsity.sparsifier import Sparsifier
from tests.trainer.small import (
    OPTIMIZERS,
    backward,
    equal,
    inactive_tensors,
    make,
    scaled,
    small_model,
    snapshot,
    train,
)


@pytest.mark.parametrize("rule", ["rigl", "set"])
@pytest.mark.parametrize("optimizer", ["sgd", "amsgrad"])
@pytest.mark.parametrize("stop", [4, 5, 6, 11])
def test_resume_is_bit_exact_around_an_update(
    rule: str, optimizer: str, stop: int, tmp_path: Any
) -> None:
    model, optim, sparsifier = make(optimizer, rule=rule)
    train(model, optim, range(17))

    first, first_optim, first_sparsifier = make(optimizer, rule=rule)
    train(first, first_optim, range(stop))
    parts = (first, first_optim, first_sparsifier)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    del first, first_optim, first_sparsifier, parts

    again, again_optim, again_sparsifier = make(optimizer, rule=rule)
    train(again, again_optim, range(50, 53))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((again, again_optim, again_sparsifier), saved, strict=True):
        part.load_state_dict(state)
    train(again, again_optim, range(stop, 17))

    assert equal(snapshot(model, optim), snapshot(again, again_optim))
    assert equal(list(sparsifier.masks.values()), list(again_sparsifier.masks.values()))
    kept, found = sparsifier.state_dict(), again_sparsifier.state_dict()
    kept.pop("masks"), found.pop("masks")
    assert kept == found


def test_resume_with_an_update_pending() -> None:
    runs = []
    for resume in (False, True):
        model, optimizer, sparsifier = make("fused sgd")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(8):
            if resume and step == 6:
                states = copy.deepcopy([x.state_dict() for x in (model, optimizer, sparsifier)])
                model, optimizer, sparsifier = make("fused sgd")
                for part, state in zip((model, optimizer, sparsifier), states, strict=True):
                    part.load_state_dict(state)
                assert sparsifier.update_due
            scaled(model, optimizer, scaler, step, bad=step == 5)
            scaler.step(optimizer)
            scaler.update()
        assert sparsifier.update_count == 1
        runs.append(snapshot(model, optimizer))
    assert equal(*runs)


def test_state_of_another_run_is_refused() -> None:
    _, _, sparsifier = make()
    before = [mask.clone() for mask in sparsifier.masks.values()]
    with pytest.raises(TrainingError, match="saved with the rule set, this run has rigl"):
        sparsifier.load_state_dict(make(rule="set")[2].state_dict())
    with pytest.raises(TrainingError, match=r"nonzeros, the model needs"):
        sparsifier.load_state_dict(make(density=0.1)[2].state_dict())
    with pytest.raises(TrainingError, match=r"differ in the layer 4\.weight"):
        sparsifier.load_state_dict(make(dense=("4",), density=0.995)[2].state_dict())
    with pytest.raises(TrainingError, match="version 9, not 1"):
        sparsifier.load_state_dict({**sparsifier.state_dict(), "version": 9})
    with pytest.raises(TrainingError, match="version None"):
        sparsifier.load_state_dict(None)  # type: ignore[arg-type]
    other = make(seed=1)[2].state_dict()
    for key in ("masks", "step", "pending"):
        with pytest.raises(TrainingError, match=f"state has no {key}"):
            sparsifier.load_state_dict({k: v for k, v in other.items() if k != key})
    assert equal(before, list(sparsifier.masks.values()))


def test_a_copied_model_is_free() -> None:
    model, optimizer, sparsifier = make()
    other = copy.deepcopy(model)
    train(model, optimizer, range(6))
    with torch.no_grad():
        other[4].weight.fill_(1.0)
    assert int(torch.count_nonzero(inactive_tensors(model, optimizer, sparsifier.masks))) == 0


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_all_three_drives_its_own(way: str) -> None:
    trio = make()
    train(trio[0], trio[1], range(4))
    copied = copy.deepcopy(trio) if way == "deepcopy" else pickle.loads(pickle.dumps(trio))
    model, optimizer, sparsifier = copied
    assert sparsifier.optimizer is optimizer and optimizer is not trio[1]
    train(model, optimizer, range(4, 12))
    assert sparsifier.step_count == 12 and trio[2].step_count == 4
    train(trio[0], trio[1], range(4, 12))
    assert equal(snapshot(model, optimizer), snapshot(trio[0], trio[1]))


def test_a_compiled_model_is_masked_under_its_own_names() -> None:
    eager, eager_optimizer, eager_sparsifier = make()
    train(eager, eager_optimizer, range(7))
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["sgd"](compiled.parameters())
    sparsifier = Sparsifier(compiled, optimizer, density=0.2, interval=5, total_steps=100)
    train(compiled, optimizer, range(7))
    assert list(sparsifier.masks) == list(eager_sparsifier.masks)
    assert equal(snapshot(eager, eager_optimizer), snapshot(model, optimizer))


def test_a_compiled_optimizer_step_still_masks_and_updates() -> None:
    eager, eager_optimizer, _ = make()
    train(eager, eager_optimizer, range(7))
    model, optimizer, sparsifier = make()
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(7):
        backward(model, optimizer, seed)
        step()
    assert sparsifier.step_count == 7 and sparsifier.update_count == 1
    assert equal(snapshot(eager, eager_optimizer), snapshot(model, optimizer))


def test_a_step_compiled_as_one_graph_says_why_not() -> None:
    model, optimizer, _ = make()
    backward(model, optimizer, 0)

    def step() -> None:
        optimizer.step()

    with pytest.raises(Exception, match="compile without fullgraph"):
        torch.compile(step, backend="eager", fullgraph=True)()


def test_steps_of_a_replayed_graph_are_counted_by_hand() -> None:
    model, optimizer, sparsifier = make()
    train(model, optimizer, range(2))
    assert not sparsifier.update_due
    sparsifier.advance(3)
    assert sparsifier.step_count == 5 and sparsifier.update_due
