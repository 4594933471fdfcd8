from __future__ import annotations

import itertools
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moon.trainer.finish as finish_module
from moon.data.load import load_pixels
from moon.data.source import open_source
from moon.errors import BackendError, DataError, DivergedError, TrainingError, UsageError
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.dataset import open_dataset
from moon.trainer.fit import EpochRecord, fit
from moon.trainer.session import Session
from moon.trainer.step import Tally
from moon.trainer.voting import Votes
from tests.trainer.recipes_small import tiny_recipe

CPU = torch.device("cpu")


class StoppedError(Exception):
    """Raised by a test to end a run early."""


def same_weights(one: Checkpoint, two: Checkpoint) -> bool:
    return set(one.state) == set(two.state) and all(
        torch.equal(value, two.state[name]) for name, value in one.state.items()
    )


def test_a_whole_run(tmp_path: Path) -> None:
    seen: list[EpochRecord] = []
    told: list[tuple[int, int, str]] = []
    checkpoint = fit(
        tiny_recipe(),
        tmp_path / "run",
        device="cpu",
        report=seen.append,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "recipe.toml", "checkpoint.safetensors", "checkpoint.json", "last", "metrics.jsonl",
        "log.txt",
    }  # fmt: skip
    assert checkpoint.training is not None
    assert checkpoint.training.images == 180
    assert Checkpoint.load(tmp_path / "run").training == checkpoint.training
    assert [record.epoch for record in seen] == [1, 2, 3, 4, 5, 6]
    assert [record.voted for record in seen] == [False] * 4 + [True] * 2
    assert seen[0].w == 0.0
    assert 0 < seen[1].w < seen[4].w < seen[5].w == 1.0
    assert all(record.p_unknown is not None and 0 < record.p_unknown < 1 for record in seen)
    assert seen[-1].loss < seen[0].loss
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "w", "p_unknown", "accuracy", "density", "seconds"} <= set(json.loads(lines[0]))
    assert (6, 6, "epoch 6 of 6") in told
    assert (6, 6, "batch norm") in told
    assert checkpoint.unknown_index == 4
    assert checkpoint.outputs == 5
    assert checkpoint.metrics["votes"] == 2
    assert checkpoint.metrics["accuracy"] > 0.8
    assert same_weights(checkpoint, Checkpoint.load(tmp_path / "run"))


def test_the_final_weights_are_sparse_to_the_count() -> None:
    checkpoint = fit(tiny_recipe())
    weights = nonzeros = 0
    for layer in checkpoint.layers:
        value = checkpoint.state[layer.name]
        mask = checkpoint.masks.get(layer.name, torch.ones_like(value, dtype=torch.bool))
        assert not value[~mask].any()
        assert int(mask.sum()) == layer.nonzeros
        weights += value.numel()
        nonzeros += layer.nonzeros
    assert abs(nonzeros - 0.2 * weights) <= len(checkpoint.layers)
    assert checkpoint.metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert checkpoint.metrics["nonzeros"] == nonzeros
    assert checkpoint.metrics["turnover"] > 0.1


def test_inactive_weights_and_momentum_stay_zero_in_channels_last() -> None:
    recipe = tiny_recipe().resolved()
    session = Session(recipe, open_dataset(recipe, CPU), CPU)
    for _ in range(2):
        session.run_epoch()
        for name, mask in session.sparsifier.masks.items():
            weight = session.model.get_parameter(name)
            momentum = session.optimizer.state[weight]["momentum_buffer"]
            if weight.ndim == 4 and weight.shape[1] > 1:
                assert weight.is_contiguous(memory_format=torch.channels_last)
                assert mask.stride() == weight.stride() == momentum.stride()
            assert not weight[~mask].any()
            assert not momentum[~mask].any()
            assert momentum[mask].any()
    assert session.sparsifier.turnover > 0


def test_the_recorded_accuracy_is_that_of_the_model_on_the_recorded_images() -> None:
    checkpoint = fit(tiny_recipe("epochs=5"))
    source = open_source(checkpoint.validation.source)
    assert checkpoint.validation.indices is not None
    chosen = np.array(checkpoint.validation.indices)
    pixels = load_pixels(source, checkpoint.preprocess, chosen)
    with torch.no_grad():
        logits = checkpoint.model()(torch.from_numpy(checkpoint.preprocess.normalise(pixels)))
    assert source.labels is not None
    right = logits[:, :4].argmax(1).numpy() == source.labels[chosen]
    assert checkpoint.metrics["accuracy"] == right.mean()


def test_the_output_is_the_uniform_average_of_the_voting_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cast: list[dict[str, torch.Tensor]] = []
    add = Votes.add

    def spy(self: Votes, model: torch.nn.Module, masks: Any = None) -> None:
        cast.append({name: value.detach().clone() for name, value in model.named_parameters()})
        add(self, model, masks)

    monkeypatch.setattr(Votes, "add", spy)
    checkpoint = fit(tiny_recipe())
    assert len(cast) == 2
    for name, one in cast[0].items():
        expected = ((one.double() + cast[1][name].double()) / 2).float()
        assert torch.equal(checkpoint.state[name], expected), name


def test_batch_norm_is_recomputed_on_the_training_images() -> None:
    # One unaugmented batch: its statistics are those of what enters the norm over all images.
    recipe = tiny_recipe("data.augment=none", "batch_size=500", "epochs=10", "update.interval=1")
    checkpoint = fit(recipe)
    source = open_source(recipe.data.train)
    assert checkpoint.validation.indices is not None
    chosen = np.setdiff1d(np.arange(200), checkpoint.validation.indices)
    pixels = load_pixels(source, recipe.data.preprocess, chosen)
    model = checkpoint.model()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        model(torch.from_numpy(recipe.data.preprocess.normalise(pixels)))
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, inputs[0].mean(dim=(0, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("rule", ["static", "set", "rigl"])
def test_every_rule(rule: str) -> None:
    checkpoint = fit(tiny_recipe(f"rule={rule}"))
    assert checkpoint.metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert (checkpoint.metrics["turnover"] > 0) is (rule != "static")


def test_the_baseline_has_no_unknown_and_no_votes() -> None:
    seen: list[EpochRecord] = []
    recipe = tiny_recipe("moon.enabled=false", "schedule=cosine", "rule=dense", "sparsity=0")
    checkpoint = fit(recipe, report=seen.append)
    assert checkpoint.unknown_index is None
    assert checkpoint.outputs == 4
    assert checkpoint.masks == {}
    assert (checkpoint.metrics["votes"], checkpoint.metrics["sparsity"]) == (0, 0.0)
    assert {(record.w, record.p_unknown, record.voted) for record in seen} == {(0.0, None, False)}
    assert len(checkpoint.state["head.weight"]) == 4


def test_each_part_can_be_taken_away() -> None:
    def run(setting: str) -> tuple[list[EpochRecord], Checkpoint]:
        seen: list[EpochRecord] = []
        return seen, fit(tiny_recipe(setting), report=seen.append)

    seen, checkpoint = run("moon.loss=false")
    assert {record.w for record in seen} == {0.0}
    assert checkpoint.metrics["votes"] == 2
    seen, _ = run("moon.auto=false")
    assert {record.w for record in seen} == {1.0}
    seen, checkpoint = run("moon.vote=false")
    assert not any(record.voted for record in seen)
    assert checkpoint.unknown_index == 4


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others() -> None:
    one = fit(tiny_recipe())
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    assert same_weights(one, fit(tiny_recipe()))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not same_weights(one, fit(tiny_recipe("seed=1")))


def test_streaming_gives_the_same_bits(digits_folder: Path) -> None:
    recipe = tiny_recipe(f"data.train={digits_folder}", "epochs=2", "moon.vote_epochs=1",
                         "update.stop=0.5")  # fmt: skip
    memory = fit(recipe)
    assert same_weights(memory, fit(recipe, budget=100, workers=2))


def test_resized_crops_train(digits_folder: Path) -> None:
    recipe = tiny_recipe(f"data.train={digits_folder}", "epochs=1", "moon.vote_epochs=0",
                         "moon.warmup_epochs=0", "data.augment=resized-crop")  # fmt: skip
    assert same_weights(fit(recipe, workers=0), fit(recipe, workers=2))


def test_pretrained_weights_start_a_run_and_choose_its_mask(tmp_path: Path) -> None:
    source = fit(tiny_recipe("rule=dense", "sparsity=0"))
    path = tmp_path / "w.pt"
    torch.save(dict(source.state), path)
    recipe = tiny_recipe(f"pretrained={path}", "rule=static", "epochs=1", "lr=1e-9",
                         "moon.vote_epochs=0", "moon.warmup_epochs=0")  # fmt: skip
    checkpoint = fit(recipe, tmp_path / "run")
    name = "stages.1.0.weight"
    kept = checkpoint.state[name][checkpoint.masks[name]].abs()
    dropped = source.state[name][~checkpoint.masks[name]].abs()
    assert kept.min() >= dropped.max() - 1e-6


def test_divergence_names_the_step_and_keeps_the_last_epoch(tmp_path: Path) -> None:
    add, numbers = Tally.add, itertools.count()

    def explode(self: Tally, loss: torch.Tensor, *rest: Any) -> None:
        add(self, loss * float("nan") if next(numbers) == 15 else loss, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tally, "add", explode)
        with pytest.raises(DivergedError, match=r"loss became nan at step 16 \(epoch 3\)"):
            fit(tiny_recipe(), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True)
    assert state["epoch"] == 2
    resumed = fit(tiny_recipe(), tmp_path / "run", resume=True)
    assert same_weights(resumed, fit(tiny_recipe()))


def test_a_real_divergence(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="Set a lower lr than"):
        fit(tiny_recipe("lr=1e30", "epochs=5", "moon.enabled=false"))


def test_resuming(tmp_path: Path) -> None:
    done = fit(tiny_recipe(), tmp_path / "run")
    with pytest.raises(UsageError, match="already holds a run"):
        fit(tiny_recipe(), tmp_path / "run")
    assert same_weights(done, fit(tiny_recipe(), tmp_path / "run", resume=True))
    with pytest.raises(UsageError, match=r"another recipe: lr is 0\.05 there"):
        fit(tiny_recipe("lr=0.2"), tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="no run to resume"):
        fit(tiny_recipe(), resume=True)


def test_resuming_on_changed_images_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(digits_folder, images)
    recipe = tiny_recipe(f"data.train={images}", "epochs=5")

    def stop(record: EpochRecord) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        fit(recipe, tmp_path / "run", report=stop)
    next(iter(sorted((images / "3").iterdir()))).unlink()
    with pytest.raises(TrainingError, match="has changed since the run began"):
        fit(recipe, tmp_path / "run", resume=True)


def test_the_sparsity_is_checked_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    recompute = finish_module.recompute_batch_norm

    def spoil(model: torch.nn.Module, batches: Any) -> int:
        with torch.no_grad():
            model.get_parameter("stages.1.0.weight").add_(1)
        return recompute(model, batches)

    monkeypatch.setattr(finish_module, "recompute_batch_norm", spoil)
    with pytest.raises(TrainingError, match=r"stages\.1\.0\.weight should have \d+ connections"):
        fit(tiny_recipe())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no device 'tpu'"):
        fit(tiny_recipe(), device="tpu")
    with pytest.raises(UsageError, match="there is no model nonesuch"):
        fit(tiny_recipe("model=nonesuch"))
    with pytest.raises(DataError):
        fit(tiny_recipe("data.train=/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="names the layer 'nolayer'"):
        fit(tiny_recipe("dense=nolayer"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="there is no CUDA device cuda here"):
            fit(tiny_recipe(), device="cuda")


def test_a_state_of_another_device_keeps_the_form_of_the_rate() -> None:
    recipe = tiny_recipe().resolved()
    data = open_dataset(recipe, CPU)
    session = Session(recipe, data, CPU)
    session.run_epoch()
    state = {**deepcopy(session.state()), "history": session.history}
    # As CUDA has it: a captured step would read a plain number once, and never again.
    state["optimizer"]["param_groups"][0].update(lr=torch.tensor(0.1), fused=True)
    resumed = Session(recipe, data, CPU)
    resumed.restore(state)
    (group,) = resumed.optimizer.param_groups
    assert isinstance(group["lr"], float) and group["fused"] is None
    resumed.run_epoch()
    session.run_epoch()
    assert torch.equal(session.model.head.weight, resumed.model.head.weight)


@pytest.mark.gpu
def test_cuda_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = fit(tiny_recipe(), device="cuda")
    assert whole.metrics["accuracy"] > 0.8

    def stop(record: EpochRecord) -> None:
        if record.epoch == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(tiny_recipe(), tmp_path / "run", device="cuda", report=stop)
    assert same_weights(whole, fit(tiny_recipe(), tmp_path / "run", device="cuda", resume=True))


@pytest.mark.gpu
def test_a_run_begun_on_the_cpu_goes_on_in_graphs(tmp_path: Path) -> None:
    def stop(record: EpochRecord) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        fit(tiny_recipe(), tmp_path / "run", device="cpu", report=stop)
    resumed = fit(tiny_recipe(), tmp_path / "run", device="cuda", resume=True)
    assert resumed.metrics["accuracy"] > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_streams_and_keeps_what_memory_and_the_eager_path_give(
    tmp_path: Path, graphs: bool
) -> None:
    # Graphs are captured while the loader's thread pins memory.
    whole = fit(tiny_recipe(), device="cuda")
    found = fit(tiny_recipe(), tmp_path / "run", device="cuda", graphs=graphs, budget=0, workers=2)
    assert same_weights(whole, found)
    assert "without CUDA graphs" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.gpu
def test_cuda_trains_with_virtual_outliers() -> None:
    settings = ("moon.enabled=false", "vos.weight=0.1", "vos.queue=4", "vos.sample_from=20")
    assert fit(tiny_recipe(*settings), device="cuda").metrics["accuracy"] > 0.5


@pytest.mark.gpu
def test_the_second_gpu_trains_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    assert same_weights(fit(tiny_recipe(), device="cuda:0"), fit(tiny_recipe(), device="cuda:1"))
    assert torch.cuda.current_device() == 0
