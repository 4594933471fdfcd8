"""Data that would mislead: overlapping, swapped, empty, not finite, named alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moon.data.items import Source
from moon.data.load import data_sha256
from moon.errors import DataError, UsageError
from moon.evaluation.evaluate import evaluate
from moon.evaluation.findings import findings
from moon.evaluation.metrics import auroc
from moon.evaluation.overlap import training_overlaps
from moon.evaluation.sets import open_sets
from moon.runtime.predictor import Predictor
from moon.scores import gen
from tests.bundles import CLASSES, images, make_bundle

N = 80


def arrays(seed, n=N, **options):
    return Source(spec=f"drawn{seed}", items=list(images(n, seed=seed)), **options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", reject=0.2)


def measured(bundle, **options):
    settings = {"id": arrays(1), "corruptions": 0, "resamples": 0, **options}
    return evaluate(bundle, **settings).to_json()


def test_images_in_two_sets_are_counted_and_named(bundle):
    mixed = list(images(N, seed=2))
    mixed[7], mixed[50] = images(N, seed=1)[3], images(N, seed=1)[4]
    plain = measured(bundle, near={"n": Source(spec="mixed", items=mixed)}, far={"f": arrays(3)})
    (found,) = plain["checks"]["overlaps"]
    assert found == {
        "set": "n", "group": "near", "with": "the known images", "n": 2, "of": N,
        "examples": ["mixed[7]", "mixed[50]"],
    }  # fmt: skip
    assert any("n: 2 of 80 images are also among the known images" in w for w in plain["warnings"])


def test_the_same_pixels_in_another_file_are_found(bundle, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(images(N, seed=1)[i, ..., 0]).save(tmp_path / f"{i}.png")
    plain = measured(bundle, far={"f": str(tmp_path)})
    assert plain["checks"]["overlaps"][0]["n"] == 3


def recorded(bundle, **data):
    provenance = {"recipe": {"data": data}}
    manifest = dataclasses.replace(bundle.manifest, provenance=provenance)
    return dataclasses.replace(bundle, manifest=manifest)


def test_images_of_the_training_data_are_found(bundle, tmp_path):
    np.savez(tmp_path / "all.npz", train_images=images(N, seed=1), test_images=images(N, seed=2))
    train = f"{tmp_path}/all.npz#train"
    trained = recorded(bundle, train=train, val=0.1)
    plain = measured(
        trained, id=f"{train}[10:30]", far={"f": f"{tmp_path}/all.npz#test", "t": f"{train}[:4]"}
    )
    found = {(one["set"], one["with"]): one["n"] for one in plain["checks"]["overlaps"]}
    assert found == {
        ("ID", f"the training data {train}"): 20,
        ("t", f"the training data {train}"): 4,
    }
    assert any("too good to believe" in warning for warning in plain["warnings"])
    assert plain["checks"]["training_unchecked"] is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({}, "does not record"),
        ({"train": "nowhere.npz#train"}, "nowhere.npz#train, recorded in the bundle, cannot be"),
        ({"train": "torchvision:MNIST"}, "might have to be downloaded"),
    ],
)
def test_training_data_that_is_not_there_is_said_not_guessed(bundle, data, why):
    found, said = training_overlaps(recorded(bundle, **data), open_sets(arrays(1), {}, {}, None))
    assert found == []
    assert why in said


def test_the_calibration_images_are_known_again(bundle):
    known = arrays(1, 300)
    gate = dataclasses.replace(bundle.gate(), data_sha256=data_sha256(known))
    same = dataclasses.replace(bundle, gates={"default": gate})
    found, _ = training_overlaps(same, open_sets(known, {}, {}, None))
    assert [(one["with"], one["n"]) for one in found] == [("the calibration images", 300)]
    assert training_overlaps(same, open_sets(arrays(2, 300), {}, {}, None))[0] == []


def test_an_empty_set_is_named(bundle):
    with pytest.raises(DataError, match="the far set f holds no images: drawn2"):
        measured(bundle, far={"f": arrays(2).select([])})
    with pytest.raises(DataError, match="the in-distribution set holds no images"):
        measured(bundle, id=arrays(2).select([]))


def test_swapped_sets_are_suspected(bundle):
    pixels = images(400, seed=4)
    ranked = Predictor.open(bundle).raw(pixels)["score_ebo"].argsort()
    low, high = (Source(spec="s", items=list(pixels[r])) for r in (ranked[:200], ranked[200:]))
    plain = measured(bundle, id=low, far={"f": high})
    assert any(
        "look whether the known and unknown sets are swapped" in w for w in plain["warnings"]
    )
    (about,) = [one for one in plain["findings"] if one["about"] == "far"]
    assert about["state"] == "bad"
    assert "the wrong way round (AUROC 0%" in about["text"]


def test_scores_that_are_not_finite_are_counted(bundle, monkeypatch):
    plain_raw = Predictor.raw

    def broken(self, pixels):
        outputs = plain_raw(self, pixels)
        outputs["logits"] = outputs["logits"].copy()
        outputs["logits"][:2] = np.nan
        outputs["logits"][2] = np.inf
        return outputs

    monkeypatch.setattr(Predictor, "raw", broken)
    plain = measured(bundle, far={"f": arrays(3)}, batch_size=N)
    assert plain["checks"]["nonfinite"]["f"]["ebo"] == 3
    assert any("f: 3 of 80 images have a score that is not finite" in w for w in plain["warnings"])
    assert 0 <= plain["scores"]["ebo"]["far"]["auroc"] <= 1


def test_a_score_that_is_not_carried_names_those_that_are(bundle):
    with pytest.raises(UsageError, match="does not carry the score knn; it carries msp, ebo, mls"):
        measured(bundle, scores=["ebo", "knn"])


def test_a_score_of_logits_need_not_be_carried_and_one_that_is_comes_from_the_graph(
    bundle, monkeypatch
):
    far = arrays(3)
    outputs = Predictor.open(bundle).raw(np.stack(far.items))
    known = Predictor.open(bundle).raw(np.stack(arrays(1).items))
    index = bundle.manifest.unknown_index
    expected = auroc(gen(known["logits"], index), gen(outputs["logits"], index))
    plain = measured(bundle, far={"f": far}, scores=["gen"])
    assert plain["scores"]["gen"]["far"]["auroc"] == pytest.approx(expected, abs=1e-3)

    plain_raw = Predictor.raw

    def carrying(self, pixels):
        found = plain_raw(self, pixels)
        return {**found, "score_vim": -found["score_ebo"]}

    monkeypatch.setattr(Predictor, "raw", carrying)
    carried = dataclasses.replace(bundle.manifest, scores=(*bundle.manifest.scores, "vim"))
    scores = measured(dataclasses.replace(bundle, manifest=carried), far={"f": far})["scores"]
    other = scores["ebo"]["far"]["auroc"]
    assert scores["vim"]["far"]["auroc"] == pytest.approx(1 - other, abs=1e-3)


def named(seed, names, spec=None):
    labels = np.random.default_rng(seed).integers(len(names), size=N)
    return dataclasses.replace(
        arrays(seed, labels=labels, class_names=names), spec=spec or f"drawn{seed}"
    )


def test_numbers_as_class_names_mean_nothing_across_files(tmp_path):
    digits = make_bundle(tmp_path / "digits", classes=("0", "1", "2"))
    known = named(1, ("0", "1", "2"), "mnist.npz#test")
    other = named(2, ("0", "1", "2"), "svhn.npz#test")
    same = named(3, ("1", "7", "8"), "mnist.npz#train")
    said = measured(digits, id=known, far={"svhn": other, "more": same})["warnings"]
    assert not any(warning.startswith("svhn:") for warning in said)
    ones = int((same.labels == 0).sum())
    assert any(
        f"more: {ones} of {N} images are of classes named as known ones are (1)" in warning
        for warning in said
    )


def test_words_as_class_names_do(bundle):
    far = named(2, (CLASSES[0], "plane", "ship"))
    said = measured(bundle, id=named(1, CLASSES), far={"f": far})["warnings"]
    assert any("classes named as known ones are (cat); if they show the same" in w for w in said)


GATE = {
    "score": "ebo", "method": "conformal", "alpha": 0.05, "risk": None,
    "achieved": {"ci95": [0.04, 0.06]},
}  # fmt: skip
SCORES = {
    "ebo": {"near": {"auroc": 0.91}, "far": None},
    "msp": {"near": {"auroc": 0.95}, "far": None},
}


@pytest.mark.parametrize(
    ("accept", "ci", "state", "text"),
    [
        (0.96, [0.95, 0.97], "good", "The promise holds here: 4.0% of known images rejected"),
        (0.945, [0.93, 0.955], "fair", "not contradicted: 5.5% of known images rejected"),
        (0.8, [0.77, 0.83], "bad", "does not hold on this data: 20.0% of known images rejected"),
    ],
)
def test_the_promise_is_judged(accept, ci, state, text):
    gate = {**GATE, "id": {"accept": accept, "accept_ci95": ci}, "near": {"reject": 0.6}}
    promise, near = findings(gate, SCORES, None)
    assert (promise["about"], promise["state"]) == ("promise", state)
    assert text in promise["text"]
    assert near["text"] == (
        "Telling near unknown images from known ones: good (AUROC 91.0% by ebo; the gate lets "
        "40.0% of them through). The score msp does better here: 95.0%."
    )


@pytest.mark.parametrize(
    ("accuracy", "ci", "state"),
    [(0.99, [0.98, 1.0], "good"), (0.97, [0.96, 0.985], "fair"), (0.9, [0.88, 0.92], "bad"),
     (None, None, "none")],
)  # fmt: skip
def test_a_promised_error_is_judged_by_the_errors(accuracy, ci, state):
    known = {"accept": 0.5, "accept_ci95": [0.4, 0.6], "accuracy": accuracy, "accuracy_ci95": ci}
    gate = {**GATE, "method": "risk", "risk": 0.02, "id": known, "near": {"reject": 0.6}}
    assert findings(gate, SCORES, None)[0]["state"] == state


def test_without_a_gate_nothing_is_promised():
    promise, near = findings(None, SCORES, None)
    assert promise["state"] == "none"
    assert "the gate" not in near["text"]
