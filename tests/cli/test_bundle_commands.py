"""export, inspect, verify, calibrate and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.bundle import Bundle
from tests.cli.conftest import KNOWN, Moon


@pytest.fixture
def own_model(tmp_path: Path) -> list[object]:
    """The words that export a linear classifier of 3x8x8 images into four classes."""
    weight = np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "own",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "own.onnx")
    (tmp_path / "classes.txt").write_text("ant\nbee\n\ncow\ndog\n", encoding="utf-8")
    words = ["--classes", tmp_path / "classes.txt", "--mean", "0.5", "--std", ".2,.2,.2"]
    return ["export", tmp_path / "own.onnx", *words]


def test_a_run_is_exported_and_calibrated(exported: Path) -> None:
    bundle = Bundle.open(exported)
    gate = bundle.gate()
    assert gate is not None
    assert (gate.score, gate.method, gate.alpha, gate.n, gate.k) == (
        "ebo",
        "conformal",
        0.05,
        150,
        7,
    )
    assert bundle.manifest.sparsity.share == pytest.approx(0.9)


def test_export_options_reach_the_bundle(moon: Moon, run: Path, tmp_path: Path) -> None:
    words = ["--weights", "dense", "--values", "fp16", "--score", "msp", "--reject", "0.1"]
    result = moon("export", run, "--out", tmp_path / "b", *words, "--json")
    assert result.code == 0
    export = result.json["provenance"]["export"]
    assert (export["weights"], export["values"], export["precision"]) == ("dense", "fp16", "fp32")
    assert (result.json["gate"]["score"], result.json["gate"]["alpha"]) == ("msp", 0.1)
    assert "scores" not in result.json["gate"]


def test_an_existing_bundle_needs_force(moon: Moon, run: Path, bundle: Path) -> None:
    version = Bundle.open(bundle).manifest.version
    result = moon("export", run, "--out", bundle)
    assert result.code == 2
    assert "Choose another --out or pass --force" in result.error
    assert Bundle.open(bundle).manifest.version == version
    assert moon("export", run, "--out", bundle, "--weights", "dense", "--force").code == 0
    assert Bundle.open(bundle).manifest.version != version


def test_ones_own_model(moon: Moon, own_model: list[object], tmp_path: Path) -> None:
    result = moon(*own_model, "--out", tmp_path / "b")
    assert result.code == 0
    assert "none: calibrate before predicting" in result.out
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.classes == ("ant", "bee", "cow", "dog")
    assert bundle.preprocess.mean == (0.5, 0.5, 0.5)
    assert bundle.gate() is None


def test_ones_own_model_with_an_unknown_and_data(
    moon: Moon, own_model: list[object], tmp_path: Path
) -> None:
    words = ["--unknown-index", "3", "--data", "sklearn:photos[0:100]", "--out", tmp_path / "b"]
    result = moon(*own_model, *words, "--json")
    assert result.code == 0
    assert result.json["unknown_index"] == 3
    assert result.json["classes"] == ["ant", "bee", "cow"]
    assert result.json["gate"]["n"] == 100


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--trt-target", "sm_86"], "--trt-target says how an engine is built. Add --trt"),
        (["--trt", "--trt-target", "ampere"], "--trt-target 'ampere' is no compute capability"),
        (["--unknown-index", "last"], "--unknown-index 'last' is neither a whole number nor none"),
        (["--mean", "red"], "--mean 'red' is not a list of numbers"),
    ],
)
def test_wrong_export_options(
    moon: Moon, own_model: list[object], tmp_path: Path, words: list[str], text: str
) -> None:
    result = moon(*own_model, *words, "--out", tmp_path / "b")
    assert result.code == 2
    assert text in result.error
    assert not (tmp_path / "b").exists()


def test_a_model_needs_its_description(moon: Moon, own_model: list[object], tmp_path: Path) -> None:
    result = moon(*own_model[:2], "--out", tmp_path / "b")
    assert result.code == 2
    assert "a MODEL.onnx needs --classes" in result.error


@pytest.mark.parametrize(
    ("option", "value"), [("--mean", "127.5"), ("--std", "58.4"), ("--mean", "-1")]
)
def test_pixels_go_from_0_to_1(
    moon: Moon, own_model: list[object], tmp_path: Path, option: str, value: str
) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    words = ["--classes", tmp_path / "classes.txt", "--mean", "0.5", "--std", "0.2"]
    words[words.index(option) + 1] = value
    result = moon(*own_model[:2], "--out", tmp_path / "b", *words)
    assert result.code == 2 and f"{option} {value}" in result.error
    assert "by 255" in result.error


def test_a_run_needs_no_description(moon: Moon, run: Path, tmp_path: Path) -> None:
    result = moon("export", run, "--out", tmp_path / "b", "--mean", "0.5")
    assert result.code == 2
    assert "--mean describes a MODEL.onnx" in result.error


def test_inspect_a_bundle(moon: Moon, exported: Path) -> None:
    facts = moon("inspect", exported, "--json").json
    assert facts["kind"] == "bundle"
    weights = sum(layer["weights"] for layer in facts["layers"])
    assert facts["weights"] == weights
    assert facts["nonzeros"] == sum(layer["nonzeros"] for layer in facts["layers"])
    assert facts["nonzeros"] == pytest.approx(0.1 * weights, abs=len(facts["layers"]))
    assert facts["sparsity"] == pytest.approx(0.9)
    assert facts["model_bytes"] == (exported / "model.onnx").stat().st_size
    assert facts["dense_bytes"] > 4 * weights
    assert 0 < facts["flops"] < facts["flops_dense"]
    text = moon("inspect", exported).out
    assert f"90.0% of {weights:,} weights are zero" in text
    assert "conformal, rejects at most 5.0% of ID on average, n = 150" in text


def test_inspect_a_run_agrees_with_its_bundle(moon: Moon, run: Path, exported: Path) -> None:
    one, other = (moon("inspect", path, "--json").json for path in (run, exported))
    assert one["kind"] == "run"
    shared = other["layers"][0].keys()
    assert [{key: layer[key] for key in shared} for layer in one["layers"]] == other["layers"]
    for key in ("weights", "nonzeros", "sparsity", "flops", "flops_dense", "classes"):
        assert one[key] == other[key]
    assert "Accuracy" in moon("inspect", run).out


def test_inspect_a_run_accounts_for_training_and_bytes(moon: Moon, run: Path) -> None:
    facts = moon("inspect", run, "--json").json
    layers = facts["layers"]
    assert facts["flops_training"] == pytest.approx(facts["metrics"]["training_flops"])
    assert facts["flops_training"] == pytest.approx(sum(row["flops_training"] for row in layers))
    for row in layers:
        assert row["dense_bytes"] == 4 * row["weights"]
        assert row["sparse_bytes"] <= row["dense_bytes"]
    stem, head = layers[0], layers[-1]
    assert (stem["activation_bytes"], head["activation_bytes"]) == (4 * 32 * 8 * 8, 4 * 9)
    text = moon("inspect", run).out
    assert "bitmask" in text and "Training" in text


def test_inspect_a_run_of_an_earlier_release(moon: Moon, run: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "checkpoint.json").read_text(encoding="utf-8"))
    old = ("name", "shape", "nonzeros", "density", "flops", "dense_flops")
    facts["layers"] = [{name: layer[name] for name in old} for layer in facts["layers"]]
    facts["metrics"].pop("memory", None)
    (tmp_path / "checkpoint.json").write_text(json.dumps(facts), encoding="utf-8")
    found = moon("inspect", tmp_path, "--json").json
    assert found["memory"] is None and found["layers"][0]["activation_bytes"] is None
    assert found["layers"][0]["dense_bytes"] == 4 * 288
    shown = moon("inspect", tmp_path)
    assert shown.code == 0 and "optimizer" not in shown.out


def test_inspect_an_unfinished_or_damaged_run(moon: Moon, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("", encoding="utf-8")
    assert "has not finished" in moon("inspect", tmp_path).error
    (tmp_path / "checkpoint.json").write_text('{"layers": 3}', encoding="utf-8")
    assert "is not a checkpoint that can be read" in moon("inspect", tmp_path).error


def test_verify_a_good_bundle(moon: Moon, exported: Path) -> None:
    found = moon("verify", exported, "--json").json
    assert found["ok"] is True
    assert {"files", "gate", "onnxruntime", "sparse"} == {
        check["name"] for check in found["checks"]
    }
    assert moon("verify", exported).code == 0


@pytest.mark.parametrize("name", ["model.onnx", "gate.json", "golden.npz", "manifest.json"])
def test_verify_finds_one_flipped_bit(moon: Moon, bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    result = moon("verify", bundle, "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    assert result.err.count("\n") == 1
    assert name in result.error


def test_calibrate_rewrites_the_gate(moon: Moon, bundle: Path) -> None:
    words = ["--score", "msp", "--reject", "0.1", "--method", "pac", "--delta", "0.2"]
    result = moon("calibrate", bundle, "--data", KNOWN, *words, "--json")
    assert result.code == 0
    gate = Bundle.open(bundle).gate()
    assert gate is not None
    assert (gate.score, gate.method, gate.alpha, gate.delta) == ("msp", "pac", 0.1, 0.2)
    assert result.json["gate"]["threshold"] == gate.threshold
    assert result.json["version"] == Bundle.open(bundle).manifest.version
    assert "rejects <= 10.0% of ID with 80%" in moon("inspect", bundle).out


def test_calibrate_by_class(moon: Moon, bundle: Path) -> None:
    words = ["--per-class", "--reject", "0.1"]
    result = moon("calibrate", bundle, "--data", KNOWN, *words, "--json")
    assert result.code == 0
    gate = Bundle.open(bundle).gate()
    assert gate is not None and gate.per_class is not None
    plain = result.json["gate"]["per_class"]
    assert [entry["threshold"] for entry in plain["classes"].values()] == [
        float(value) for value in gate.per_class.values
    ]
    assert "scores" not in json.dumps(plain)
    text = moon("inspect", bundle).out
    assert "rejects at most 10.0% of ID predicted as each class on average" in " ".join(
        text.split()
    )
    rows = [line.split() for line in text.splitlines()]
    for name, group in gate.per_class.own.items():
        assert [name, f"{group.value:.6g}", str(group.n)] in [row[:3] for row in rows]
    assert moon("verify", bundle).code == 0
    shown = moon("calibrate", bundle, "--data", KNOWN, *words).out
    assert "rejected here" in shown and "No promise is made" in shown
    assert moon("calibrate", bundle, "--data", KNOWN).code == 0
    one = Bundle.open(bundle).gate()
    assert one is not None and one.per_class is None


def test_pooled_classes_are_named(moon: Moon, bundle: Path) -> None:
    some = "sklearn:digits#test{label in 0..5}"  # 6 and 7 are hardly ever predicted
    result = moon("calibrate", bundle, "--data", some, "--per-class")
    assert result.code == 0
    gate = Bundle.open(bundle).gate()
    assert gate is not None and gate.per_class is not None and gate.per_class.pooled
    said = " ".join(result.out.split())
    assert "Pooled, as a class needs 19 images predicted as it: " in said
    assert "the promise holds for them together" in said


def test_a_backends_own_gate(moon: Moon, bundle: Path) -> None:
    before = Bundle.open(bundle).gate()
    words = ["--backend", "fake", "--per-class", "--reject", "0.2"]
    result = moon("calibrate", bundle, "--data", KNOWN, *words, "--json")
    assert result.code == 0 and result.json["backend"] == "fake"
    after = Bundle.open(bundle)
    fake = after.gate("fake")
    assert fake is not None and fake.backend == "fake" and fake.alpha == 0.2
    assert after.gate() == before and set(after.gates) == {"default", "fake"}
    plain = json.loads((bundle / "gate.json").read_text())
    assert plain["gates"]["fake"]["per_class"]["fewest"] == 4
    moon("calibrate", bundle, "--data", KNOWN, "--backend", "onnxruntime", "--reject", "0.2")
    again = Bundle.open(bundle)
    assert set(again.gates) == {"default", "fake"} and again.gate("fake") == fake
    assert again.gates["default"].alpha == 0.2


def test_a_score_is_chosen_by_images_made_from_the_known_ones(moon: Moon, bundle: Path) -> None:
    result = moon("calibrate", bundle, "--data", KNOWN, "--score", "auto")
    assert result.code == 0
    gate = Bundle.open(bundle).gate()
    assert gate is not None and gate.choice is not None
    assert (gate.choice.n, gate.n) == (87, 346)  # a fifth of 433
    assert gate.choice.score == gate.score
    said = " ".join(result.out.split())
    assert "Compared by 87 images, which do not calibrate, against images made from them" in said
    assert gate.choice.reason in said
    assert all(name in said for name in ("msp", "ebo", "mls", "unknown", "chosen", "near", "far"))


def test_a_score_is_chosen_by_given_images(moon: Moon, bundle: Path) -> None:
    given = ["--ood", "sklearn:digits#test{label==8}", "--ood", "sklearn:digits#test{label==9}"]
    words = ["calibrate", bundle, "--data", KNOWN, "--score", "auto", *given]
    result = moon(*words, "--json")
    assert result.code == 0 and result.json["warnings"] == []
    choice = result.json["gate"]["choice"]
    assert [one["name"] for one in choice["ood"]] == given[1::2]
    assert all(len(one["data_sha256"]) == 64 for one in choice["ood"])
    figures = [one["auroc"] for one in choice["candidates"]]
    assert figures == sorted(figures, reverse=True) and len(figures) == 4
    text = moon(*words)
    assert text.code == 0 and "{label==9}" in text.out and "behind the best" in text.out
    again = moon("calibrate", bundle, "--data", KNOWN)
    assert "warning: the score" in again.err and "which voids the promise" in again.err


def test_a_risk_chooses_its_method(moon: Moon, bundle: Path) -> None:
    result = moon("calibrate", bundle, "--data", KNOWN, "--risk", "0.2")
    assert result.code == 0
    assert "error among accepted <= 20.0% with 95%" in result.out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--ood", "sklearn:photos"], 2, "Add --score auto, or leave --ood out"),
        (["--score", "auto", "--ood", "no/such"], 1, "the out-of-distribution set no/such"),
        (["--score", "auto", "--ood", KNOWN], 1, "are among the in-distribution images"),
        (["--score", "auto", "--reject", "0.0025"], 1, "at least 499 held-out images, or name"),
        (["--score", "auto", "--backend", "fake"], 2, "none to choose"),
        (["--method", "risk"], 2, "--method risk needs the error to allow"),
        (["--method", "pac", "--risk", "0.1"], 2, "--risk does not go with --method pac"),
        (["--reject", "0.001"], 1, "at least 999"),
        (["--reject", "0.001", "--per-class"], 1, "at least 999"),
        (["--risk", "0.1", "--per-class"], 2, "the method risk has no thresholds by class"),
        (["--backend", "tensorrt"], 1, "TensorRT"),
        (["--score", "nope"], 2, "does not carry the score nope"),
    ],
)
def test_wrong_calibrations_change_nothing(
    moon: Moon, bundle: Path, words: list[str], code: int, text: str
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    result = moon("calibrate", bundle, "--data", KNOWN, *words)
    assert result.code == code
    assert text in result.error
    assert (bundle / "manifest.json").read_bytes() == before


def test_doctor(moon: Moon) -> None:
    found = moon("doctor", "--json").json
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["numpy"] == np.__version__
    assert found["backends"]["onnxruntime"]["ok"] is True
    assert found["backends"]["sparse"]["ok"] is True and versions["llvmlite"]
    assert "tensorrt" in found["backends"]["tensorrt"]["reason"].lower()
    text = moon("doctor").out
    assert "onnxruntime" in text
    assert "not in this version" in text
