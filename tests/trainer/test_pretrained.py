from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moon.errors import TrainingError
from moon.trainer.models import build
from moon.trainer.pretrained import load_pretrained


def cnn(outputs: int = 3, channels: int = 1, seed: int = 0) -> nn.Module:
    return build("cnn", outputs=outputs, channels=channels, size=(8, 8), seed=seed)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_file_of_the_same_model(tmp_path: Path, suffix: str) -> None:
    source, target = cnn(seed=1), cnn(seed=2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    assert load_pretrained(target, "cnn", str(path)) == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_sparse_run_s_masks_are_left_behind(tmp_path: Path) -> None:
    source, target = cnn(seed=1), cnn(seed=2)
    path = tmp_path / "checkpoint.safetensors"
    mask = {"mask:head.weight": torch.zeros(3, dtype=torch.uint8)}
    save_file(source.state_dict() | mask, path)
    assert load_pretrained(target, "cnn", str(path)) == []
    assert torch.equal(target.state_dict()["head.weight"], source.state_dict()["head.weight"])


def test_common_wrappings(tmp_path: Path) -> None:
    source, target = cnn(seed=1), cnn(seed=2)
    path = tmp_path / "w.pt"
    state = {f"module._orig_mod.{name}": v for name, v in source.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    assert load_pretrained(target, "cnn", str(path)) == []
    assert torch.equal(target.head.weight, source.head.weight)


def test_another_head_and_stem_start_afresh(tmp_path: Path) -> None:
    source, target = cnn(outputs=5, channels=3, seed=1), cnn(seed=2)
    head, stem = target.head.weight.clone(), target.stem[0].weight.clone()
    width = head.shape[1]
    path = tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    assert load_pretrained(target, "cnn", str(path)) == [
        f"the head (head) starts afresh: it is [5, {width}] there and [3, {width}] here",
        "the stem (stem.0) starts afresh: it is [32, 3, 3, 3] there and [32, 1, 3, 3] here",
    ]
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.stem[0].weight, stem)
    assert torch.equal(target.stages[1][0].weight, source.stages[1][0].weight)


def test_a_head_that_is_missing_starts_afresh(tmp_path: Path) -> None:
    state = {name: v for name, v in cnn(seed=1).state_dict().items() if "head" not in name}
    path = tmp_path / "w.pt"
    torch.save(state, path)
    target = cnn()
    assert load_pretrained(target, "cnn", str(path)) == [
        "the head (head) starts afresh: it is missing there and "
        f"{list(target.head.weight.shape)} here"
    ]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo owned",)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"

    def attempt(match: str) -> None:
        with pytest.raises(TrainingError, match=match):
            load_pretrained(cnn(), "cnn", str(path))

    attempt("there is no weights file")
    torch.save(build("resnet18", outputs=3).state_dict(), path)
    attempt("has no tensor stem")
    state = cnn().state_dict()
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    attempt(r"has a tensor extra\.weight unknown to the model")
    torch.save({**state, "stages.1.0.weight": torch.zeros(1)}, path)
    attempt(r"stages\.1\.0\.weight is \[1\], the model's is")
    torch.save({"a": 3}, path)
    attempt("a is no tensor")
    torch.save([], path)
    attempt("holds no state dict")
    path.write_bytes(b"nonsense")
    attempt("w.pt")
    path.write_bytes(pickle.dumps(Evil()))
    attempt("w.pt")


def test_names_of_torchvision() -> None:
    with pytest.raises(TrainingError, match="torchvision has no weights for cnn"):
        load_pretrained(cnn(), "cnn", "IMAGENET1K_V1")
    model = build("resnet18", outputs=3, size=(96, 96))
    with pytest.raises(TrainingError, match="Give one of IMAGENET1K_V1, DEFAULT"):
        load_pretrained(model, "resnet18", "IMAGENET9K")
