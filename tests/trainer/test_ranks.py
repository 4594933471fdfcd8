"""What one process alone does, how batches are shared out, and runs of two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moon.cli import main
from moon.data.preprocess import Preprocess
from moon.errors import (
    BackendError,
    DataError,
    MissingExtraError,
    MoonError,
    RecipeError,
    TrainingError,
    UsageError,
)
from moon.trainer.batches import Batches, RawBatch, slice_of
from moon.trainer.device import find_device
from moon.trainer.objective.loss import AutoWeight
from moon.trainer.pixels import MemoryPixels
from moon.trainer.ranks import EndedError, Failure, Launch, Ranks, joined, stoppable

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GREY = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 1 of 2, whose peers are not there."""
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def play(scenario: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.trainer.ranked", str(folder), scenario],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# ---------------------------------------------------------------- one process


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks()
    model = torch.nn.Linear(2, 2)
    assert (ranks.rank, ranks.world, ranks.leads) == (0, 1, True)
    assert ranks.gather("x") == ["x"]
    assert ranks.decide(lambda: 3) == 3
    assert ranks.total([1, 2.5]) == [1, 2.5]
    assert ranks.wrap(model) is model
    ranks.check_same({"this": "that", "weight": model.weight})
    ranks.settle(None)
    with ranks.agreeing(), ranks.in_turn():
        pass
    with pytest.raises(KeyError), ranks.agreeing():
        raise KeyError("x")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert type(ranks) is Ranks
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    with joined() as ranks, stoppable():
        assert ranks.world == 1


def test_the_environment_of_torchrun(torchrun: pytest.MonkeyPatch) -> None:
    assert Launch.of_environment() == Launch(rank=1, world=2, local_rank=1, local_world=2)
    torchrun.delenv("MASTER_PORT")
    with pytest.raises(UsageError, match=r"has WORLD_SIZE=2, but no MASTER_PORT.*torchrun"):
        Launch.of_environment()
    torchrun.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK is 'first' in the environment"), joined():
        pass


def test_processes_that_do_not_come_are_not_waited_for_long(
    torchrun: pytest.MonkeyPatch,
) -> None:
    torchrun.setenv("MOON_RANK_TIMEOUT", "1")
    late = pytest.raises(TrainingError, match=r"the 2 processes .* did not meet at 127\.0\.0\.1:1")
    with late, joined("cpu"):
        pass
    torchrun.setenv("MOON_RANK_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="MOON_RANK_TIMEOUT is 'soon'"), joined("cpu"):
        pass


def test_failures_travel_as_their_own_kind() -> None:
    error = Failure.of(DataError("no images in x", remedy="Add some"), 3).error()
    assert type(error) is DataError
    assert error.told
    assert str(error) == "rank 3: no images in x. Add some."
    assert type(Failure.of(RecipeError("lr is 0"), 0).error()) is RecipeError
    assert type(Failure.of(MissingExtraError("torch", "train", "it"), 0).error()) is MoonError
    assert str(Failure.of(ValueError("odd"), 1).error()) == "rank 1: ValueError: odd."
    assert str(Failure.of(KeyboardInterrupt(), 1).error()) == "rank 1: KeyboardInterrupt."


def test_sigterm_is_an_error_among_several_processes_only(torchrun: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(EndedError, match=r"ended by SIGTERM.*--resume"), stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
        # The error can be told in peace.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, before)
        torchrun.delenv("WORLD_SIZE")
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_names_its_rank(
    torchrun: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("moon: error: rank 1: ")
    assert main(["train", "--no-such-option"]) == 2
    assert capsys.readouterr().err == ""
    torchrun.setenv("RANK", "0")
    assert main(["train", "--no-such-option"]) == 2
    assert capsys.readouterr().err.startswith("moon: error: moon train has no option")


class Eight(Ranks):
    """Rank 5 of 8, of which 4 are on this machine."""

    rank, world, local_rank, local_world = 5, 8, 1, 4


def test_each_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu", Eight()) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device("cuda", Eight()) == torch.device("cuda", 1)
    assert find_device("auto", Eight()) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="8 processes cannot share cuda:0"):
        find_device("cuda:0", Eight())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BackendError, match="4 processes need as many CUDA devices"):
        find_device("cuda", Eight())


# ---------------------------------------------------------------- shares of a batch


@given(count=st.integers(0, 40), world=st.integers(1, 9))
def test_slices_are_contiguous_disjoint_complete_and_even(count: int, world: int) -> None:
    positions = np.arange(count)[::-1]
    parts = [slice_of(positions, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), positions)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == count // world


def shared(count: int, batch_size: int, rank: int, world: int, **options: Any) -> Batches:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    settings: dict[str, Any] = {"augment": "crop-flip", "seed": 5, **options}
    return Batches(
        MemoryPixels(pixels, CPU), np.arange(count), GREY, batch_size, CPU,
        rank=rank, world=world, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "batch_size", "world"), [(64, 16, 2), (61, 15, 2), (70, 16, 3)])
def test_the_ranks_together_see_what_one_process_sees(
    count: int, batch_size: int, world: int
) -> None:
    alone = shared(count, batch_size, 0, 1)
    ranks = [shared(count, batch_size, rank, world) for rank in range(world)]
    assert {len(each) for each in ranks} == {len(alone)}
    for epoch in (1, 2):
        steps: list[tuple[RawBatch, ...]] = list(
            zip(*(each.raw_epoch(epoch) for each in ranks), strict=True)
        )
        for whole, parts in zip(alone.raw_epoch(epoch), steps, strict=True):
            assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
            x = torch.cat([alone.prepare(part) for part in parts])
            assert torch.equal(alone.prepare(whole), x)
            shares = [part.share for part in parts]
            assert sum(shares) == pytest.approx(world)
            assert shares == [
                pytest.approx(len(part.labels) * world / len(whole.labels)) for part in parts
            ]
    assert [each.sizes for each in ranks] == [
        [len(batch.labels) for batch in each.raw_epoch(1)] for each in ranks
    ]
    # Of whole batches, as for validation, each rank takes every so many.
    found = [y for each in ranks for _, y in each.epoch(1)]
    expected = [y for _, y in alone.epoch(1)]
    assert sorted(y.tolist() for y in found) == sorted(y.tolist() for y in expected)


def test_a_last_batch_with_too_few_images_for_a_rank_is_left_out() -> None:
    assert len(shared(16 + 3, 16, 0, 1)) == 2
    assert len(shared(16 + 3, 16, 0, 2)) == len(shared(16 + 3, 16, 1, 2)) == 1
    assert len(shared(16 + 4, 16, 1, 2)) == 2
    assert len(shared(16 + 1, 16, 1, 2, seed=None)) == 2  # validation leaves out nothing
    with pytest.raises(UsageError, match="batch_size 5 is too small for 3 processes"):
        shared(60, 5, 0, 3)
    with pytest.raises(DataError, match="5 training images are too few"):
        shared(5, 6, 0, 3)


def test_shares_make_the_mean_of_the_ranks_the_moving_average_of_whole_batches() -> None:
    draws = np.random.default_rng(1)
    whole = AutoWeight(total_epochs=9, warmup_epochs=5)
    ranks = [AutoWeight(total_epochs=9, warmup_epochs=5) for _ in range(2)]
    for sizes in [(16, 17), (16, 17), (2, 3)]:
        losses = [torch.from_numpy(draws.random(size)) for size in sizes]
        zero = [torch.zeros(size) for size in sizes]
        whole.observe(torch.cat(losses), torch.cat(zero))
        for rank, size, loss, p in zip(ranks, sizes, losses, zero, strict=True):
            rank.share = size * 2 / sum(sizes)
            rank.observe(loss, p)
    values = [rank.average for rank in ranks]
    assert values[0] is not None and values[1] is not None
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    assert whole.average == pytest.approx(sum(values) / 2, rel=1e-6)  # type: ignore[arg-type]


# ---------------------------------------------------------------- two processes


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    found = play("smoke", tmp_path)
    first, second = found["ranks"]
    assert (first["status"], second["status"]) == (0, 0)
    assert first["weights"] == second["weights"] == found["file"]
    assert (first["reported"], second["reported"]) == ([1, 2, 3, 4, 5, 6], [])
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["processes"] == 2
    assert first["metrics"]["votes"] == 2
    assert first["metrics"]["turnover"] > 0.1
    assert first["metrics"]["accuracy"] > 0.6
    assert not first["left"]
    # The folder is looked at once, and said once to be taken.
    assert "already holds a run" in first["again"]
    assert "already holds a run" in second["again"]
    assert (first["told"], second["told"]) == (False, True)
    assert first["finished"] == second["finished"] == found["file"]


@pytest.mark.slow
def test_two_slices_are_as_good_as_the_whole_batch(tmp_path: Path) -> None:
    for rule, found in play("equal", tmp_path).items():
        assert found["masks"], rule
        assert found["turnover"] > 0.3
        assert found["weights"] < 1e-6
        assert found["accuracy"] == 0
        assert all(value < 1e-6 for value in found["history"].values()), found["history"]


@pytest.mark.slow
def test_streaming_decodes_each_image_on_one_rank_and_changes_nothing(tmp_path: Path) -> None:
    found = play("streamed", tmp_path)
    weights = {each["weights"] for each in found["memory"] + found["streamed"]}
    assert len(weights) == 1
    # Two epochs of 180 training images, and the 20 held-out ones three times in one batch.
    assert [each["decoded"] for each in found["streamed"]] == [180 + 60, 180]


@pytest.mark.slow
def test_another_mask_on_one_rank_ends_the_run(tmp_path: Path) -> None:
    found = play("tampered", tmp_path)
    for rank, told in zip(found["ranks"], (False, True), strict=True):
        assert (rank["status"], rank["kind"], rank["told"]) == (1, "TrainingError", told)
        text = "the mask of stages.1.0.weight is not the same on rank 1 as on rank 0"
        assert rank["error"].startswith(text)
    assert found["kept"] == 1  # The epoch after which they differed was not saved.


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both_and_is_told_once(tmp_path: Path) -> None:
    found = play("mistakes", tmp_path)
    expected = {
        "infinite": ("DivergedError", "the loss became inf at step 15 (epoch 3)", 0),
        "unreadable": ("ImageError", "seven.png is truncated", 1),
        "another": ("TrainingError", "the recipe is not the same on rank 1 as on rank 0", 0),
        "nowhere": ("DataError", "there is no file or folder /nowhere", 0),
        "small": ("UsageError", "batch_size 3 is too small for 2 processes", 0),
        "unwritable": ("MoonError", "could not write", 0),
    }
    assert set(found) == set(expected)
    for name, (kind, text, teller) in expected.items():
        for rank, each in enumerate(found[name]):
            assert (each["status"], each["kind"]) == (1, kind), name
            assert text in each["error"]
            assert each["told"] is (rank != teller), name
    assert "keeps epoch 2" in found["infinite"][0]["error"]
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_as_many_processes_as_it_began(tmp_path: Path) -> None:
    found = play("alone", tmp_path)
    assert found["statuses"] == [-signal.SIGKILL] * 2
    text = "the run was trained by 2 processes, this is 1. Resume it with 2 processes"
    assert found["by_one"].startswith(text)
    for rank in found["by_two"]:
        text = "the run was trained by 1 process, this is 2. Resume it with 1 process"
        assert rank["error"].startswith(text)


@pytest.mark.slow
def test_a_rank_killed_anywhere_ends_the_other_and_both_resume_to_the_same_bits(
    tmp_path: Path,
) -> None:
    found = play("killed", tmp_path)
    assert len(found) == 4
    for spot, each in found.items():
        victim = int(spot[0])
        survivor = each["first"][1 - victim]
        assert each["first"][victim]["status"] == -signal.SIGKILL
        assert survivor["status"] == 1
        assert survivor["error"].startswith("another process of the run died")
        assert (each["again"], each["wrong"]) == ([0, 0], []), spot


@pytest.mark.slow
def test_batch_norm_is_recomputed_over_whole_batches_shared_out(tmp_path: Path) -> None:
    found = play("norms", tmp_path)
    for name, whole in found["whole"].items():
        # Two batches leave one of three ranks without; eight are 3, 3 and 2.
        batches = {"few": 2, "many": 8}[name]
        for rank in found["ranks"]:
            assert rank[name] == found["ranks"][0][name]
            for key, value in whole.items():
                assert rank[name][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
            assert rank[name]["stem.2.num_batches_tracked"] == [batches]


@pytest.mark.slow
def test_a_process_group_that_is_there_is_used_and_left(tmp_path: Path) -> None:
    for rank in play("adopted", tmp_path)["ranks"]:
        assert (rank["status"], rank["left"], rank["world"], rank["total"]) == (0, True, 2, 2.0)


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(tmp_path: Path) -> None:
    found = play("silent", tmp_path)
    assert "has not answered for 2 s" in found["ranks"][0]["error"]
    assert found["ranks"][1]["status"] == 1
