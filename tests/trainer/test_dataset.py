from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moon.data.fingerprint import pixel_fingerprints, training_overlap
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.errors import DataError
from moon.trainer.dataset import Dataset, open_dataset
from tests.trainer.recipes_small import tiny_recipe

RGB = ("data.preprocess.mean=.5,.5,.5", "data.preprocess.std=.5,.5,.5", "batch_size=2")


def opened(*settings: str) -> Dataset:
    return open_dataset(tiny_recipe(*settings), torch.device("cpu"))


def test_a_count_is_held_out_and_recorded() -> None:
    data = opened()
    assert (data.train.images, data.validation.images) == (180, 20)
    assert data.classes == ("0", "1", "2", "3")
    source = open_source(data.held_out.source)
    assert data.held_out.indices is not None
    assert data.held_out.sha256 == data_sha256(source, data.held_out.indices)
    assert source.labels is not None
    held = torch.cat([y for _, y in data.validation.epoch()])
    assert held.tolist() == source.labels[list(data.held_out.indices)].tolist()
    assert np.bincount(held).tolist() == [5, 5, 5, 5]


def test_what_is_trained_on_is_sketched_and_what_is_held_out_is_not() -> None:
    recipe = tiny_recipe()
    data = opened()
    source = open_source(recipe.data.train)
    held = list(data.held_out.indices or ())
    trained = np.setdiff1d(np.arange(len(source)), held)
    assert (data.trained_on.images, data.trained_on.sampled) == (180, 180)
    wanted = pixel_fingerprints(source, trained, recipe.data.preprocess)
    assert data.trained_on.fingerprints.tolist() == sorted(wanted.tolist())
    found = training_overlap(data.trained_on, source, held, recipe.data.preprocess)
    assert found is not None
    assert found.matches == 0
    assert opened().trained_on == data.trained_on


def test_the_seed_moves_the_split() -> None:
    assert opened().held_out == opened().held_out
    assert opened().held_out.indices != opened("seed=1").held_out.indices


def test_a_source_of_its_own(class_folder: Path) -> None:
    data = opened(f"data.train={class_folder}", f"data.val={class_folder}", *RGB)
    assert (data.train.images, data.validation.images) == (9, 9)
    assert data.classes == ("ant", "bee", "cow")
    assert data.held_out.indices is None
    assert data.held_out.sha256 == data_sha256(open_source(class_folder))


def test_validation_labels_go_by_name(class_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "val"
    for name in ("bee", "cow"):
        (other / name).mkdir(parents=True)
        data = (class_folder / name / "0.png").read_bytes()
        (other / name / "x.png").write_bytes(data)
    data = opened(f"data.train={class_folder}", f"data.val={other}", *RGB)
    assert torch.cat([y for _, y in data.validation.epoch()]).tolist() == [1, 2]
    (other / "dog").mkdir()
    (other / "dog" / "d.png").write_bytes((class_folder / "ant" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"dog/d\.png is of none of the 3 classes"):
        opened(f"data.train={class_folder}", f"data.val={other}", *RGB)


def test_useless_training_sets_are_refused(class_folder: Path, tmp_path: Path) -> None:
    flat = class_folder / "ant"
    with pytest.raises(DataError, match="has no labels, so nothing can be learned"):
        opened(f"data.train={flat}", *RGB)
    with pytest.raises(DataError, match="has no labels to validate with"):
        opened(f"data.train={class_folder}", f"data.val={flat}", *RGB)
    with pytest.raises(DataError, match="has one class only, 3"):
        opened("data.train=sklearn:digits#train{label==3}")
    images = np.zeros((6, 8, 8, 1), np.uint8)
    path = tmp_path / "gap.npz"
    np.savez(path, train_images=images, train_labels=np.array([0, 0, 0, 2, 2, 2]))
    with pytest.raises(DataError, match="has no image of the class 1"):
        opened(f"data.train={path}#train", "data.val=2")
    np.savez(path, train_images=images, train_labels=np.array([0, 0, 0, 1, 1, -1]))
    with pytest.raises(DataError, match=r"no known label \(-1\). Filter"):
        opened(f"data.train={path}#train", "data.val=2")


def test_virtual_outliers_that_would_never_begin_are_refused() -> None:
    # 200 images of 4 classes: some 45 of each are trained on, 6 times.
    settings = ("moon.enabled=false", "vos.weight=0.1")
    assert opened(*settings, "vos.queue=200").classes
    with pytest.raises(DataError, match=r"vos would never begin: the 4\d training images of the"):
        opened(*settings, "vos.queue=300")
    assert opened(*settings, "vos.queue=300", "epochs=9").classes
