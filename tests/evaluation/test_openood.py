"""Benchmarks by name: OpenOOD's layout on small generated files, and packed ones."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moon.data.source import open_source
from moon.errors import DataError, UsageError
from moon.evaluation.openood import BENCHMARKS, find_benchmark


def put(root, benchmark, name, *, where="images_classic", n=3, labels=True, there=True):
    """A set as OpenOOD stores it: its list, and its images unless they were not fetched."""
    lines = []
    for i in range(n):
        path = f"{name}/test images/{i:04}.png" if i == 1 else f"{name}/{i:04}.png"
        lines.append(f"{path} {i if labels else -1}")
        if there:
            file = root / where / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(file)
    listing = root / "benchmark_imglist" / benchmark / f"test_{name}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_set_of_a_benchmark_is_found_and_opens(tmp_path, name):
    layout = BENCHMARKS[name]
    where = "images_largescale" if name == "imagenet" else "images_classic"
    for one in (layout.known, *layout.near, *layout.far):
        put(tmp_path, name, one, where=where, labels=one == layout.known)
    found = find_benchmark(name, tmp_path)
    assert found.missing == ()
    assert (tuple(found.near), tuple(found.far)) == (layout.near, layout.far)
    source = open_source(found.id)
    assert source.labels.tolist() == [0, 1, 2]
    assert all(len(open_source(spec)) == 3 for spec in {**found.near, **found.far}.values())


def test_textures_of_imagenet_may_lie_among_the_classic_images(tmp_path):
    put(tmp_path, "imagenet", "imagenet", where="images_largescale")
    put(tmp_path, "imagenet", "texture", where="images_classic")
    found = find_benchmark("imagenet", tmp_path)
    assert list(found.far) == ["textures"]
    assert found.far["textures"].endswith("images_classic")


def test_missing_sets_are_named_with_what_was_looked_for(tmp_path):
    put(tmp_path, "cifar10", "cifar10")
    put(tmp_path, "cifar10", "svhn")
    put(tmp_path, "cifar10", "tin", there=False)
    found = find_benchmark("cifar10", tmp_path)
    assert (list(found.near), list(found.far)) == ([], ["svhn"])
    assert [line.split(":")[0] for line in found.missing] == [
        "cifar100", "tin", "mnist", "texture", "places365"
    ]  # fmt: skip
    assert "test_cifar100.txt" in found.missing[0]
    assert "its list is there but not its images" in found.missing[1]


def test_packed_files_serve_as_well(tmp_path):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    overlap = np.array([0, 1, 2, 0])
    np.savez(tmp_path / "cifar10.npz", test_images=pixels, test_labels=np.arange(4))
    np.savez(tmp_path / "tinyimagenet32_test.npz", test_images=pixels, test_cifar10_overlap=overlap)
    found = find_benchmark("cifar10", tmp_path)
    assert len(open_source(found.id)) == 4
    assert len(open_source(found.near["tin"])) == 2  # none of CIFAR-10's own classes
    np.savez(tmp_path / "cifar100.npz", test_images=pixels)
    other = find_benchmark("cifar100", tmp_path)
    assert len(open_source(other.near["tin"])) == 4


def test_what_is_given_is_not_looked_for(tmp_path):
    put(tmp_path, "mnist", "notmnist")
    found = find_benchmark("mnist", tmp_path, known="elsewhere", given=["fashionmnist", "tin"])
    assert found.id == "elsewhere"
    assert list(found.near) == ["notmnist"]
    assert not any(line.startswith(("fashionmnist", "tin")) for line in found.missing)


def test_nothing_to_measure_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no benchmark 'cifar11'"):
        find_benchmark("cifar11", tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        find_benchmark("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs its known set: cifar10"):
        find_benchmark("cifar10", tmp_path)
    put(tmp_path, "cifar10", "cifar10")
    with pytest.raises(DataError, match=r"none of the unknown sets .* cifar100, tin, mnist"):
        find_benchmark("cifar10", tmp_path)
    listing = tmp_path / "benchmark_imglist" / "cifar10" / "test_svhn.txt"
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="could not read the image list"):
        find_benchmark("cifar10", tmp_path)
