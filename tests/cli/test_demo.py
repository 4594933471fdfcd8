"""``moon demo``: its folder, and the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moon.bundle import Bundle
from moon.cli.demo_folder import MARKER, DemoFolder
from moon.errors import UsageError
from tests.cli.conftest import Moon, process


def write(folder: DemoFolder, name: str) -> None:
    with folder.part(name) as path:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "file").write_text("x", encoding="utf-8")


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = DemoFolder(out)
    write(first, "run")
    with first.part("bench.json") as path:
        path.write_text("{}", encoding="utf-8")
    first.finish({"bundle": "x"})
    assert json.loads((out / MARKER).read_text(encoding="utf-8"))["result"] == {"bundle": "x"}
    DemoFolder(out)
    assert [path.name for path in out.iterdir()] == [MARKER]


def test_an_interrupted_demo_is_replaced_with_its_half_part(tmp_path: Path) -> None:
    first = DemoFolder(tmp_path / "demo")
    write(first, "run")
    with pytest.raises(KeyboardInterrupt), first.part("report") as path:
        path.mkdir()
        (path / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt
    DemoFolder(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARKER]


@pytest.mark.parametrize("place", ["mine.txt", "run/mine.txt", "run/deep/mine.txt"])
def test_a_file_that_no_demo_wrote_stops_it(tmp_path: Path, place: str) -> None:
    out = tmp_path / "demo"
    folder = DemoFolder(out)
    write(folder, "run")
    write(folder, "report")
    (out / place).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=f"holds {place}, which no demo wrote"):
        DemoFolder(out)
    assert (out / place).read_text(encoding="utf-8") == "mine"
    assert (out / "report" / "deep" / "file").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    DemoFolder(out)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x", encoding="utf-8")
    (out / "run").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="holds run, which no demo wrote"):
        DemoFolder(out)
    assert (elsewhere / "precious").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"moon_demo": 2, "files": []}'])
def test_other_folders_are_left_alone(moon: Moon, tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text, encoding="utf-8")
    result = moon("demo", "--out", tmp_path)
    assert result.code == 2
    assert "holds files that are not a demo's" in result.error
    assert (tmp_path / MARKER).read_text(encoding="utf-8") == text


def test_a_file_is_no_place_for_a_demo(moon: Moon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "is a file" in moon("demo", "--out", tmp_path / "file").error


@pytest.mark.slow
def test_the_whole_demo_twice(tmp_path: Path) -> None:
    first = process("demo", "--json", cwd=tmp_path, timeout=300)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert document["evaluation"]["id"]["accuracy"] > 0.95
    for score in document["evaluation"]["scores"].values():
        assert score["near"]["auroc"] > 0.9
        assert score["far"]["auroc"] > 0.9
    assert document["model"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert document["seconds"]["total"] < 180
    bundle = Bundle.open(tmp_path / document["bundle"])
    assert bundle.gate() is not None
    again = process("demo", cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    for word in ("Accuracy", "Sparsity", "model.onnx", "AUROC", "Rejected", "Latency", "Bundle"):
        assert word in again.stdout
