"""The gate that a bundle has now, with an engine built before: nothing here runs on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.class_calibration import calibrate_per_class
from moon.errors import BackendError
from moon.gate_calibration import Promise, calibrate_conformal
from moon.runtime.backend import open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.trt.outcome import Outcome
from tests.bundles import images, make_bundle
from tests.runtime.trt.conftest import Open
from tests.test_graph_p_values import source, with_p_values


def _scores(bundle: Bundle, name: str, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    found = open_backend(bundle).run(bundle.preprocess.normalise(images(n, seed=11)))
    return found[f"score_{name}"], found["label"]


def _engine_like(bundle: Bundle) -> dict[str, np.ndarray]:
    found = open_backend(bundle).run(bundle.preprocess.normalise(images(60, seed=4)))
    return {name: found[name] for name in ("logits", "label", *_carried(bundle))}


def _carried(bundle: Bundle) -> list[str]:
    return [f"score_{name}" for name in bundle.manifest.scores]


@pytest.mark.parametrize("score", ["msp", "mls", "unknown"])
def test_another_score_after_the_engine_was_built(
    tmp_path: Path, open_standin: Open, score: str
) -> None:
    bundle = make_bundle(tmp_path / "b")
    old = bundle.model_bytes()  # what the engine is made of
    again = bundle.with_gate(calibrate_conformal(_scores(bundle, score)[0], 0.3, score=score))
    assert again.gate_score == score != bundle.gate_score
    batch = again.preprocess.normalise(images(60, seed=4))
    found = open_standin(again, model=old).run(batch)
    expected = open_backend(again).run(batch)
    assert not np.array_equal(expected["score"], open_backend(old).run(batch)["score"])
    for name in ("score", "label"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    np.testing.assert_array_equal(found["accept"], expected["accept"])
    assert 0 < found["accept"].mean() < 1


def test_thresholds_by_class_after_the_engine_was_built(tmp_path: Path, open_standin: Open) -> None:
    bundle = make_bundle(tmp_path / "b")
    old = bundle.model_bytes()
    scores, labels = _scores(bundle, "ebo", 900)
    gate = calibrate_per_class(scores, labels, bundle.classes, Promise.of(0.2, None), score="ebo")
    again = bundle.with_gate(gate)
    batch = again.preprocess.normalise(images(200, seed=4))
    backend = open_standin(again, model=old)
    found, expected = backend.run(batch), open_backend(again).run(batch)
    np.testing.assert_array_equal(found["accept"], expected["accept"])
    one = backend.run(batch, 1.5)
    np.testing.assert_array_equal(one["accept"], open_backend(again).run(batch, 1.5)["accept"])
    assert (one["accept"] != found["accept"]).any()


def test_a_gate_of_its_own_comes_before_the_default_one(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    scores, _ = _scores(bundle, "ebo")
    own = replace(calibrate_conformal(scores, 0.6, score="ebo"), backend="tensorrt")
    both = bundle.with_gate(own, "tensorrt")
    engine = _engine_like(both)
    mine = Outcome(both, "tensorrt", list(engine), "e").of(dict(engine))["accept"]
    default = Outcome(both, "tensorrt_rtx", list(engine), "e").of(dict(engine))["accept"]
    np.testing.assert_array_equal(mine, own.accepts(engine["score_ebo"]))
    assert mine.sum() < default.sum()


def test_without_a_gate_nothing_is_accepted(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", calibrated=False)
    engine = _engine_like(bundle)
    outcome = Outcome(bundle, "tensorrt", list(engine), "e")
    assert not outcome.of(dict(engine))["accept"].any()
    assert outcome.of(dict(engine), -1e9)["accept"].all()
    assert not outcome.of(dict(engine), float("nan"))["accept"].any()


def test_scores_that_are_not_finite_are_never_accepted(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    engine = _engine_like(bundle)
    engine["score_ebo"] = engine["score_ebo"].copy()
    engine["score_ebo"][:3] = [np.nan, np.inf, -np.inf]
    outcome = Outcome(bundle, "tensorrt", list(engine), "e")
    assert not outcome.of(engine, -1e9)["accept"][:3].any()


def test_an_engine_that_makes_no_label(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    engine = _engine_like(bundle)
    label = engine.pop("label")
    found = Outcome(bundle, "tensorrt", list(engine), "e").of(engine)
    np.testing.assert_array_equal(found["label"], label)


def test_p_values_are_those_of_the_gate_now(tmp_path: Path, open_standin: Open) -> None:
    blank = with_p_values(tmp_path / "p")
    old = blank.model_bytes()
    again = calibrate(blank, source(tmp_path, 300), reject=0.1)
    batch = again.preprocess.normalise(images(40, seed=4))
    found, expected = open_standin(again, model=old).run(batch), open_backend(again).run(batch)
    assert list(found) == list(expected)
    for name in (f"p_{score}" for score in again.manifest.scores):
        assert not np.isnan(expected[name]).any()
        np.testing.assert_array_equal(found[name], expected[name])


def test_half_precision_and_int32_become_what_the_graph_says(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    engine = _engine_like(bundle)
    engine["logits"] = engine["logits"].astype(np.float16)
    engine["label"] = engine["label"].astype(np.int32)
    found = Outcome(bundle, "tensorrt", list(engine), "e").of(engine)
    assert found["logits"].dtype == np.float32 and found["label"].dtype == np.int64


def test_an_engine_that_lacks_a_score(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    with pytest.raises(BackendError, match="e lacks the output score_mls, which the bundle's"):
        Outcome(bundle, "tensorrt", ["logits", "score_msp", "score_ebo"], "e")
