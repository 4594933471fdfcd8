from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moon.data.fingerprint import TrainingSketch
from moon.errors import MoonError, TrainingError
from moon.trainer.accounting.flops import count_flops
from moon.trainer.checkpoint import Checkpoint, Validation, versions
from moon.trainer.models import build
from tests.trainer.recipes_small import tiny_recipe


def make(seed: int = 0) -> Checkpoint:
    recipe = tiny_recipe()
    model = build("cnn", outputs=5, channels=1, size=(8, 8), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(value.shape, generator=draw) < 0.3
        for name, value in model.named_parameters()
        if value.ndim == 4
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return Checkpoint(
        recipe=recipe,
        classes=("a", "b", "c", "déf"),
        unknown_index=4,
        preprocess=recipe.data.preprocess,
        state=model.to(memory_format=torch.channels_last).state_dict(),
        masks=masks,
        validation=Validation(source="x#y", indices=(3, 5), sha256="ab"),
        layers=count_flops(model, torch.zeros(1, 1, 8, 8), masks),
        metrics={"accuracy": 0.5, "epochs": 6},
        versions=versions(),
        training=TrainingSketch(images=90, fingerprints=np.array([3, 2**64 - 1], np.uint64)),
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = make()
    saved.save(tmp_path)
    again = Checkpoint.load(tmp_path)
    for name in ("recipe", "classes", "unknown_index", "preprocess", "validation", "layers",
                 "metrics", "versions", "outputs", "training"):  # fmt: skip
        assert getattr(again, name) == getattr(saved, name), name
    assert again.outputs == 5
    for one, two in ((saved.state, again.state), (saved.masks, again.masks)):
        assert set(one) == set(two)
        for name, value in one.items():
            assert torch.equal(value, two[name])
            assert value.dtype == two[name].dtype
    x = torch.randn(2, 1, 8, 8)
    model = again.model()
    assert not model.training
    assert torch.equal(model(x), saved.model()(x))


def test_the_weights_file_is_plain_and_its_masks_are_packed(tmp_path: Path) -> None:
    saved = make()
    saved.save(tmp_path)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    assert {name for name in tensors if not name.startswith("mask:")} == set(saved.state)
    mask = tensors["mask:stages.1.0.weight"]
    assert mask.dtype == torch.uint8
    assert mask.numel() == tensors["stages.1.0.weight"].numel() / 8
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    assert facts["recipe_sha256"] == saved.recipe.hash
    assert facts["layers"][0]["name"] == "stem.0.weight"
    assert facts["validation"] == {"source": "x#y", "indices": [3, 5], "sha256": "ab"}


def test_a_validation_source_of_its_own_has_no_indices(tmp_path: Path) -> None:
    saved = make()
    object.__setattr__(saved, "validation", Validation(source="x", indices=None, sha256="c"))
    saved.save(tmp_path)
    assert Checkpoint.load(tmp_path).validation == saved.validation


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    change(facts)
    (path / "checkpoint.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.update(schema_version=2), "has schema version 2, this is 1"),
        (lambda facts: facts.pop("classes"), "has no field classes"),
        (lambda facts: facts.update(classes="ab"), "classes in checkpoint.json must be"),
        (lambda facts: facts["recipe"].update(rule="x"), "damaged: rule is 'x'"),
        (lambda facts: facts["preprocess"].update(crop=[0, 1]), "damaged: crop must be"),
        (lambda facts: facts.update(layers=3), "layers in checkpoint.json is no list"),
        (lambda facts: facts["layers"][0].pop("shape"), "a layer has no field shape"),
        (lambda facts: facts["file"].update(sha256="0"), "its SHA-256 differs"),
        (lambda facts: facts["training"].update(sampled=3), "training has not 3 fingerprints"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    make().save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(TrainingError) as caught:
        Checkpoint.load(tmp_path)
    assert message in str(caught.value)


def test_checkpoints_of_earlier_releases_have_no_sketch(tmp_path: Path) -> None:
    make().save(tmp_path)
    edit(tmp_path, lambda facts: facts.pop("training"))
    assert Checkpoint.load(tmp_path).training is None


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is no finished run: it has no checkpoint\.json"):
        Checkpoint.load(tmp_path)
    (tmp_path / "recipe.toml").write_text(tiny_recipe().to_toml())
    with pytest.raises(TrainingError, match=r"has not finished.*--resume"):
        Checkpoint.load(tmp_path)
    make().save(tmp_path)
    weights = tmp_path / "checkpoint.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(TrainingError, match="SHA-256 differs"):
        Checkpoint.load(tmp_path)
    weights.unlink()
    with pytest.raises(TrainingError, match=r"cannot read .*safetensors: No such file"):
        Checkpoint.load(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot read"):
        Checkpoint.load(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    checkpoint = make()
    object.__setattr__(checkpoint, "classes", ("a", "b"))
    with pytest.raises(TrainingError, match="do not fit cnn"):
        checkpoint.model()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoonError, match="could not write"):
        make().save(tmp_path / "file" / "run")


def test_layers_of_earlier_releases_have_no_bytes(tmp_path: Path) -> None:
    make().save(tmp_path)
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    old = ("name", "shape", "nonzeros", "density", "flops", "dense_flops")
    facts["layers"] = [{name: layer[name] for name in old} for layer in facts["layers"]]
    (tmp_path / "checkpoint.json").write_text(json.dumps(facts))
    layer = Checkpoint.load(tmp_path).layers[0]
    assert layer.value_bytes == 4 and layer.activation_bytes is layer.saved_bytes is None
