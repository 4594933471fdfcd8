"""Compact checkpoints: every bit comes back, and a damaged file is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moon.errors import TrainingError
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.compact import _digest, load_compact, save_compact
from tests.trainer.test_checkpoint import make


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Checkpoint, b: Checkpoint) -> bool:
    assert a.facts() == b.facts()
    assert a.state.keys() == b.state.keys() and a.masks.keys() == b.masks.keys()
    pairs = [(a.state[n], b.state[n]) for n in a.state]
    pairs += [(a.masks[n], b.masks[n]) for n in a.masks]
    return all(x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y) for x, y in pairs)


def positive_zeros(checkpoint: Checkpoint) -> Checkpoint:
    state = dict(checkpoint.state)
    for name, mask in checkpoint.masks.items():
        state[name] = state[name].masked_fill(~mask, 0.0)
    return replace(checkpoint, state=state)


@pytest.fixture
def checkpoint() -> Checkpoint:
    return positive_zeros(make())


def test_every_bit_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    size = save_compact(checkpoint, tmp_path / "a.moonckpt")
    assert size == (tmp_path / "a.moonckpt").stat().st_size
    assert same(load_compact(tmp_path / "a.moonckpt"), checkpoint)


def test_zeros_are_not_stored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_compact(checkpoint, tmp_path / "a.moonckpt")
    stored = load_file(tmp_path / "a.moonckpt")
    for name, mask in checkpoint.masks.items():
        assert name not in stored
        assert stored["values:" + name].shape == (int(mask.sum()),)


@pytest.mark.parametrize("value", [-0.0, 1e-30, float("nan")])
def test_a_layer_that_is_not_zero_outside_its_mask_is_kept_whole(
    checkpoint: Checkpoint, tmp_path: Path, value: float
) -> None:
    name = next(iter(checkpoint.masks))
    state = {key: tensor.clone() for key, tensor in checkpoint.state.items()}
    away = (~checkpoint.masks[name]).nonzero()[0]
    state[name][tuple(away)] = value
    odd = replace(checkpoint, state=state)
    save_compact(odd, tmp_path / "a.moonckpt")
    assert same(load_compact(tmp_path / "a.moonckpt"), odd)


def test_active_zeros_infinities_and_nan_survive(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in checkpoint.state.items()}
    for name, mask in checkpoint.masks.items():
        for i, value in enumerate((0.0, -0.0, float("inf"), float("nan"))):
            state[name][tuple(mask.nonzero()[i])] = value
    odd = replace(checkpoint, state=state)
    save_compact(odd, tmp_path / "a.moonckpt")
    assert same(load_compact(tmp_path / "a.moonckpt"), odd)


def test_a_dense_checkpoint_is_kept_as_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    dense = replace(checkpoint, masks={})
    save_compact(dense, tmp_path / "a.moonckpt")
    assert same(load_compact(tmp_path / "a.moonckpt"), dense)


def test_any_changed_byte_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.moonckpt"
    save_compact(checkpoint, path)
    whole = path.read_bytes()
    for at in [0, 9, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(TrainingError, match=r"damaged|no compact checkpoint"):
            load_compact(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(checkpoint: Checkpoint, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.moonckpt"
    save_compact(checkpoint, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TrainingError, match=r"a\.moonckpt is no compact checkpoint, or damaged"):
        load_compact(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no file"):
        load_compact(tmp_path / "none.moonckpt")
    save_file({"a": torch.zeros(2)}, tmp_path / "b.moonckpt")
    with pytest.raises(TrainingError, match="does not describe a run"):
        load_compact(tmp_path / "b.moonckpt")


def test_tensors_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Also where somebody made the hash right again."""
    path = tmp_path / "a.moonckpt"
    save_compact(checkpoint, path)
    with safe_open(str(path), framework="pt") as file:
        text = file.metadata()["checkpoint"]
    tensors = load_file(path)
    name = "values:" + next(iter(checkpoint.masks))
    tensors[name] = tensors[name][:-1]
    save_file(tensors, path, {"checkpoint": text, "sha256": _digest(text, tensors)})
    with pytest.raises(TrainingError, match="its tensors do not fit each other"):
        load_compact(path)
