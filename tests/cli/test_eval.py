"""``moon eval``: benchmarks by name, corrupted images, re-encoding, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moon.data.source import open_source
from tests.cli.conftest import KNOWN, Moon

FAR = "photos=sklearn:photos"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenOOD's layout of the benchmark mnist: digits, one near and one far set of it."""
    folder = tmp_path_factory.mktemp("openood")
    specs = {
        "mnist": KNOWN,
        "notmnist": "sklearn:digits#test{label in 8..9}",
        "texture": "sklearn:photos",
    }
    for name, spec in specs.items():
        source = open_source(spec)
        lines = []
        for i in range(40):
            item = source.item(i)
            image = item if isinstance(item, Image.Image) else Image.fromarray(np.squeeze(item))
            path = folder / "images_classic" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            label = -1 if name != "mnist" or source.labels is None else source.labels[i]
            lines.append(f"{name}/{i}.png {label}")
        listing = folder / "benchmark_imglist" / "mnist" / f"test_{name}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_benchmark_by_name(moon: Moon, exported: Path, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    words = ["--benchmark", "mnist", "--root", root, "--corruptions", "8", "--out", out]
    result = moon("eval", exported, *words)
    assert result.code == 0
    assert "left out, not there: fashionmnist: no " in result.out.replace("\n", " ")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["benchmark"]["name"] == "mnist"
    assert [line.split(":")[0] for line in report["benchmark"]["missing"]] == [
        "fashionmnist", "cifar10", "tin", "places365"
    ]  # fmt: skip
    assert list(report["sets"]["near"]) == ["notmnist"]
    assert list(report["sets"]["far"]) == ["texture"]
    assert report["id"]["accuracy"] > 0.8
    assert report["corruptions"]["n"] == 8
    assert "4 of the sets of the benchmark mnist are not there" in (out / "report.html").read_text()
    assert {path.name for path in (out / "plots").iterdir()} == {
        "roc.png", "scores.png", "reliability.png", "risk-coverage.png", "corruptions.png",
        "classes.png",
    }  # fmt: skip
    for path in (out / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.width > 400
    assert "The promise" in result.out

    # Its own sets may be joined and replaced, and a second call takes up what is done.
    more = ["--near", "fashionmnist=sklearn:photos", "--json"]
    again = moon("eval", exported, *words, *more)
    assert list(again.json["sets"]["near"]) == ["notmnist", "fashionmnist"]
    assert again.json["scores"]["ebo"]["far"] == report["scores"]["ebo"]["far"]


def test_reencoding_and_no_corruptions(moon: Moon, exported: Path, tmp_path: Path) -> None:
    words = ["--id", KNOWN, "--far", FAR, "--limit", "30", "--out", tmp_path / "r", "--json"]
    report = moon("eval", exported, *words, "--jpeg", "75", "--corruptions", "0").json
    assert report["jpeg"] == 75
    assert report["corruptions"] is None
    assert "all re-encoded as JPEG 75" in (tmp_path / "r" / "report.html").read_text()


def test_training_images_are_recognised(moon: Moon, exported: Path, tmp_path: Path) -> None:
    words = ["--id", "sklearn:digits#train{label in 0..7}", "--limit", "25", "--corruptions", "0"]
    result = moon("eval", exported, *words, "--out", tmp_path / "r")
    assert result.code == 0
    shown = " ".join(result.out.split())
    assert "25 of 25 images are also among the training data sklearn:digits#train" in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "there are no in-distribution images to measure on"),
        (["--benchmark", "mnist"], "--benchmark and --root go together"),
        (["--root", "."], "--benchmark and --root go together"),
        (["--benchmark", "mnist", "--root", "nowhere"], "--root nowhere is no folder"),
        (["--benchmark", "coco", "--root", "."], "there is no benchmark 'coco'"),
        (["--id", KNOWN, "--jpeg", "101"], "'--jpeg'"),
        (["--id", KNOWN, "--corruptions", "-1"], "'--corruptions'"),
        (["--id", KNOWN, "--scores", "knn99"], "does not carry the score knn99"),
    ],
)
def test_misuse(moon: Moon, exported: Path, tmp_path: Path, words: list[str], text: str) -> None:
    result = moon("eval", exported, *words, "--out", tmp_path / "r")
    assert result.code == 2
    assert text in result.error
    assert not (tmp_path / "r").exists()


def test_an_empty_set_is_named(moon: Moon, exported: Path, tmp_path: Path) -> None:
    words = ["--id", KNOWN, "--far", "none=sklearn:photos[0:0]", "--out", tmp_path / "r"]
    result = moon("eval", exported, *words)
    assert result.code == 1
    assert "none" in result.error
    assert not (tmp_path / "r").exists()
