"""predict, score, eval and bench."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from moon.runtime.predictor import Predictor
from tests.cli.conftest import KNOWN, Moon, process

NEAR = "eights=sklearn:digits#test{label==8}"
FAR = "photos=sklearn:photos"


def test_predictions_follow_the_schema(moon: Moon, exported: Path, images: list[Path]) -> None:
    result = moon("predict", exported, *images, "--json")
    assert result.code == 0
    bundle = Predictor.open(exported).bundle
    model = {"name": bundle.manifest.name, "version": bundle.manifest.version}
    assert result.json["model"] == model
    assert [entry["input"] for entry in result.json["predictions"]] == [str(i) for i in images]
    for entry in result.json["predictions"]:
        fields = {"input", "decision", "label", "reason", "top", "score", "p_value"}
        assert set(entry) == fields
        assert entry["decision"] in ("accept", "abstain")
        assert (entry["label"] is None) == (entry["decision"] == "abstain")
        assert (entry["reason"] is None) == (entry["decision"] == "accept")
        assert len(entry["top"]) == 5
        score = entry["score"]
        assert score["direction"] == "higher_is_in_distribution"
        assert (entry["decision"] == "accept") == (score["value"] >= score["threshold"])


def test_a_bad_image_does_not_stop_the_others(
    moon: Moon, exported: Path, images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken[red].png"
    broken.write_bytes(images[0].read_bytes()[:40])
    result = moon("predict", exported, images[0], broken, images[1], "--json")
    assert result.code == 1
    entries = result.json["predictions"]
    assert [("error" in entry) for entry in entries] == [False, True, False]
    assert set(entries[1]) == {"input", "error"}
    assert result.error.startswith("moon: error: 1 of 3 images could not be read: ")
    assert "is truncated" in result.error
    table = moon("predict", exported, images[0], broken, images[1])
    assert table.code == 1
    assert "broken[red].png" in table.out.replace("\n", "")


def test_a_threshold_is_taken_with_a_warning(
    moon: Moon, exported: Path, images: list[Path]
) -> None:
    result = moon("predict", exported, images[0], "--threshold", "1000", "--json")
    assert result.code == 0
    (entry,) = result.json["predictions"]
    assert entry["decision"] == "abstain"
    assert entry["score"]["threshold"] == 1000
    assert result.err.startswith("moon: warning: ")


def test_the_table_shows_what_would_have_been_said(
    moon: Moon, exported: Path, images: list[Path]
) -> None:
    result = moon("predict", exported, *images, "--threshold", "1000")
    assert result.out.count("abstain") == 3
    assert "accept when ebo >= 1000" in result.out


def test_scores_in_parquet_are_the_predictors(moon: Moon, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.parquet"
    spec = "sklearn:digits#test"
    result = moon("score", exported, spec, "--out", out, "--probabilities", "--json")
    assert result.code == 0
    table = pyarrow.parquet.read_table(out)
    names = ["input", "label", "decision", "reason", "score", "threshold", "p_value"]
    scores = ["msp", "ebo", "mls", "unknown"]
    classes = [f"p_{digit}" for digit in range(8)]
    assert table.column_names == [*names, *scores, *classes, "error"]
    rows = table.to_pylist()
    assert result.json["rows"] == len(rows) == 539
    assert result.json["accept"] + result.json["abstain"] == 539

    from moon.data.source import open_source

    source = open_source(spec)
    decisions = Predictor.open(exported).predict(source.item(i) for i in range(60))
    for row, decision, i in zip(rows, decisions, range(60), strict=False):
        assert row["input"] == source.name(i)
        assert row["label"] == decision.label
        assert (row["decision"] == "accept") == decision.accepted
        assert row["score"] == pytest.approx(decision.score, rel=1e-5)
        assert row["ebo"] == row["score"]
        assert row["p_value"] == pytest.approx(decision.p_value)
        known = sum(row[name] for name in classes)
        assert known + -row["unknown"] == pytest.approx(1, abs=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]


def test_an_unreadable_image_is_a_row_with_its_error(
    moon: Moon, exported: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(images[0].read_bytes())
    (folder / "b.png").write_bytes(b"not an image")
    result = moon("score", exported, folder, "--out", tmp_path / "s.parquet")
    assert result.code == 1
    assert "1 of 2 images could not be read" in result.error
    good, bad = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert good["error"] is None
    assert bad["error"]
    assert bad["decision"] is None
    assert bad["score"] is None


def test_a_failed_score_leaves_the_old_file(moon: Moon, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    out.write_bytes(b"old")
    assert moon("score", exported, tmp_path / "none", "--out", out).code == 1
    assert out.read_bytes() == b"old"
    (tmp_path / "file").write_bytes(b"")
    result = moon("score", exported, KNOWN, "--out", tmp_path / "file" / "s.parquet")
    assert result.code == 1
    assert "could not write" in result.error


def test_only_plain_files_are_replaced(moon: Moon, exported: Path, tmp_path: Path) -> None:
    pipe, target, link = tmp_path / "pipe", tmp_path / "target", tmp_path / "link"
    os.mkfifo(pipe)
    assert moon("score", exported, KNOWN, "--out", pipe).code == 2
    assert pipe.is_fifo()
    assert moon("score", exported, KNOWN, "--out", tmp_path).code == 2
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert moon("score", exported, f"{KNOWN}[0:5]", "--out", link).code == 0
    assert link.is_symlink()
    assert len(pyarrow.parquet.read_table(target)) == 5


def test_a_full_disk_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    out = tmp_path / "s.parquet"
    done = process("score", exported, "sklearn:digits", "--out", out, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"moon: error: could not write {out}.parts/000000.part: File too large. "
    )
    assert not list(tmp_path.iterdir())


def test_eval_writes_and_prints_the_report(moon: Moon, exported: Path, tmp_path: Path) -> None:
    words = ["--id", KNOWN, "--near", NEAR, "nines=sklearn:digits#test{label==9}", "--far", FAR]
    result = moon("eval", exported, *words, "--limit", "80", "--out", tmp_path / "r", "--json")
    assert result.code == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    assert result.json == report
    assert report["id"]["n"] == 80
    assert list(report["scores"]["ebo"]["near"]["sets"]) == ["eights", "nines"]
    assert (tmp_path / "r" / "report.html").stat().st_size > 1000


def test_eval_of_several_bundles_and_chosen_scores(
    moon: Moon, exported: Path, bundle: Path, tmp_path: Path
) -> None:
    words = ["--id", KNOWN, "--far", FAR, "--scores", "msp, mls", "--limit", "40"]
    result = moon("eval", exported, bundle, *words, "--out", tmp_path / "r")
    assert result.code == 0
    assert result.out.count("far AUROC") == 2
    assert "near AUROC" not in result.out
    assert "unknown " not in result.out.split("far AUROC")[1].split("digits")[0].replace(
        "unknown inputs", ""
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--near", "photos"], "--near 'photos' is not NAME=SOURCE"),
        (["--near", FAR, "--far", FAR], "'photos' is both a --near and a --far set"),
        (["--far", FAR, "--far", FAR], "--far names 'photos' twice"),
        (["--scores", "nope"], "nope"),
        (["--limit", "0"], "'--limit'"),
    ],
)
def test_wrong_evaluations(
    moon: Moon, exported: Path, tmp_path: Path, words: list[str], text: str
) -> None:
    result = moon("eval", exported, "--id", KNOWN, *words, "--out", tmp_path / "r")
    assert result.code == 2
    assert text in result.error
    assert not (tmp_path / "r").exists()


def test_bench_and_compare(moon: Moon, exported: Path, tmp_path: Path) -> None:
    one, picture = tmp_path / "a.json", tmp_path / "a.svg"
    words = ["--queries", "64", "--out", one, "--picture", picture]
    result = moon("bench", exported, *words)
    assert result.code == 0
    assert "times as fast as dense" in result.out
    assert "not valid: 64 queries are fewer than 1024" in result.out
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    written = json.loads(one.read_text(encoding="utf-8"))
    assert written["latency_ms"]["n"] == 64
    assert written["baseline"]["name"] == "dense"

    compared = moon("bench", "--compare", one, one, "--json")
    assert compared.code == 0
    assert compared.json["speedup"]["ratio"] == pytest.approx(1)
    assert compared.json["comparable"] is False
    text = moon("bench", "--compare", one, one).out
    assert "B is 1.00 times as fast as A" in text
    assert "not comparable: A is not valid" in text


def test_bench_without_a_baseline_at_a_rate(moon: Moon, exported: Path) -> None:
    words = ["--baseline", "none", "--scenario", "rate", "--rate", "500", "--queries", "40"]
    result = moon("bench", exported, *words, "--json")
    assert result.code == 0
    assert result.json["baseline"] is None
    assert result.json["config"]["rate"] == 500
    assert all(math.isfinite(value) for value in result.json["latency_ms"].values())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--backend", "tensorrt"], 1, "not in this version"),
        (["--picture", "x.foo"], 2, "x.foo is no kind of picture"),
        (["other"], 2, "moon bench takes one bundle, and got 2"),
        (["--compare"], 2, "--compare takes two results, and got 1"),
        (["--scenario", "server"], 2, "'single', 'multi', 'rate'"),
    ],
)
def test_wrong_benches(moon: Moon, exported: Path, words: list[str], code: int, text: str) -> None:
    result = moon("bench", exported, *words)
    assert result.code == code
    assert text in result.error


def test_what_is_no_result_is_not_compared(moon: Moon, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert "not a result of moon bench" in moon("bench", "--compare", a, a).error
    assert "is not JSON" in moon("bench", "--compare", b, b).error


def test_arrays_of_another_shape_are_errors_not_resized(
    moon: Moon, exported: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "odd.npz", test_images=np.zeros((2, 9, 9, 1), np.uint8))
    result = moon(
        "score", exported, f"{tmp_path / 'odd.npz'}#test", "--out", tmp_path / "o.parquet"
    )
    assert result.code == 1
    row = pyarrow.parquet.read_table(tmp_path / "o.parquet").to_pylist()[0]
    assert "9" in row["error"]
    assert "8" in row["error"]


def test_image_files_of_another_size_are_converted(
    moon: Moon, exported: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "large.jpg")
    assert moon("predict", exported, tmp_path / "large.jpg").code == 0
