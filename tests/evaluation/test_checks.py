"""Data that would mislead: overlapping, swapped, empty, not finite, named alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moon.choice import Candidate, Choice, OodSet
from moon.data.fingerprint import TrainingSketch, sketch
from moon.data.items import Source
from moon.data.load import data_sha256
from moon.errors import DataError, UsageError
from moon.evaluation.caveats import training_checked
from moon.evaluation.evaluate import evaluate
from moon.evaluation.findings import findings
from moon.evaluation.metrics import auroc
from moon.evaluation.overlap import training_overlaps
from moon.evaluation.page import render
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
        "set": "n", "group": "near", "with": "the known images", "n": 2, "of": N, "estimated": None,
        "examples": ["mixed[7]", "mixed[50]"],
    }  # fmt: skip
    assert any("n: 2 of 80 images are also among the known images" in w for w in plain["warnings"])


def test_images_in_two_unknown_sets_are_told_once_for_each_pair(bundle):
    first, second, third = (list(images(N, seed=s)) for s in (2, 3, 4))
    second[5] = first[9]
    third[0], third[1] = first[1], second[2]
    a, b, c = (Source(spec=f"{i}", items=s) for i, s in enumerate((first, second, third)))
    plain = measured(bundle, near={"a": a, "b": b}, far={"c": c})
    found = [
        (o["set"], o["with"], o["n"], o["examples"], o["of_group"])
        for o in plain["checks"]["overlaps"]
    ]
    assert found == [
        ("b", "those of the near set a", 1, ["1[5]"], "near"),
        ("c", "those of the near set a", 1, ["2[0]"], "near"),
        ("c", "those of the near set b", 1, ["2[1]"], "near"),
    ]
    assert (
        "b: 1 of 80 images are also among those of the near set a (1[5]); they count twice, in the "
        "figures of both sets and the mean of near."
    ) in plain["warnings"]
    assert any(w.endswith("they count twice, in the figures of far and of near.")
               for w in plain["warnings"])  # fmt: skip
    apart = measured(bundle, near={"a": arrays(2), "b": arrays(3)}, far={"c": arrays(4)})
    assert apart["checks"]["overlaps"] == []


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


def sketched(bundle, source, images=None):
    made = sketch(source, bundle.preprocess)
    made = dataclasses.replace(made, images=images or made.images)
    return dataclasses.replace(bundle, training=made)


@pytest.mark.parametrize("jpeg", [None, 60])
def test_images_of_the_sketched_training_set_are_found_without_it(bundle, tmp_path, jpeg):
    """Half the known images and three unknown ones, as other files; one in ten was sampled."""
    from PIL import Image

    for i in range(3):
        Image.fromarray(images(N, seed=5)[i, ..., 0]).save(tmp_path / f"{i}.bmp")
    trained = Source(spec="t", items=[*images(N, seed=1)[: N // 2], *images(N, seed=5)])
    known = sketched(bundle, trained, images=1200)
    plain = measured(known, far={"f": str(tmp_path), "g": arrays(6)}, jpeg=jpeg)
    found = {one["set"]: one for one in plain["checks"]["overlaps"]}
    assert set(found) == {"ID", "f"}
    assert found["ID"] == {
        "set": "ID", "group": "id", "with": "the training images", "n": 40, "of": N,
        "estimated": 80, "examples": ["drawn1[0]", "drawn1[1]", "drawn1[2]"],
    }  # fmt: skip
    assert (found["f"]["n"], found["f"]["estimated"]) == (3, 3)
    assert plain["checks"]["training_sample"] == {"images": 1200, "sampled": 120, "finds": 29}
    (said,) = [one for one in plain["findings"] if one["about"] == "training"]
    assert said["state"] == "bad"
    assert said["text"].startswith(
        "At least 40 of the 80 known images were in training (estimated 80), so"
    )
    assert any(
        w.startswith("f: at least 3 of 3 images were in training, estimated 3 (0.bmp")
        for w in plain["warnings"]
    )


def test_nothing_is_said_where_nothing_was_trained_on(bundle):
    plain = measured(sketched(bundle, arrays(7)), far={"f": arrays(3)})
    assert plain["checks"]["overlaps"] == []
    assert not any(one["about"] == "training" for one in plain["findings"])


def test_what_is_found_file_by_file_is_not_told_twice_but_more_of_it_is(bundle, tmp_path):
    np.savez(tmp_path / "all.npz", train_images=images(N, seed=1))
    train = f"{tmp_path}/all.npz#train"
    known = recorded(sketched(bundle, arrays(1)), train=train)
    plain = measured(known, id=f"{train}[:20]", far={"f": arrays(3)})
    assert [one["with"] for one in plain["checks"]["overlaps"]] == [f"the training data {train}"]
    (said,) = [one for one in plain["findings"] if one["about"] == "training"]
    assert said["text"].startswith("20 of the 20 known images were in training, so")
    recoded = measured(known, id=arrays(1), far={"f": arrays(3)})
    assert recoded["checks"]["overlaps"][0]["n"] == N


@pytest.mark.parametrize(
    ("why", "sample", "text"),
    [
        (None, None, "compared, file by file, with the images"),
        ("x is gone", None, "could not be checked: x is gone."),
        (None, (5000, 1024), "compared, file by file"),
        ("x is gone", (5000, 1024), "a sample of the training images, 1,024 of 5,000, by pixels "),
        ("x is gone", (900, 900), "compared with the 900 training images, by pixels"),
    ],
)
def test_what_was_checked_is_said_in_words(why, sample, text):
    plain = None
    if sample:
        one = TrainingSketch(images=sample[0], fingerprints=np.zeros(sample[1], np.uint64))
        plain = {"images": one.images, "sampled": one.sampled, "finds": one.finds}
    said = training_checked({"training_unchecked": why, "training_sample": plain})
    assert text in said
    assert training_checked(None) is None
    assert training_checked({"training_unchecked": None})  # of earlier releases


def test_the_calibration_images_are_known_again(bundle):
    known = arrays(1, 300)
    gate = dataclasses.replace(bundle.gate(), data_sha256=data_sha256(known))
    same = dataclasses.replace(bundle, gates={"default": gate})
    found, _ = training_overlaps(same, open_sets(known, {}, {}, None))
    assert [(one["with"], one["n"]) for one in found] == [("the calibration images", 300)]
    assert training_overlaps(same, open_sets(arrays(2, 300), {}, {}, None))[0] == []


def chosen(bundle, known, *unknown):
    """The bundle with a gate whose score was chosen on these sources."""
    best = Candidate(score="ebo", auroc=0.9, sets={}, behind=0.0, behind_ci95=(0, 0), tied=False)
    ood = tuple(
        OodSet(name=one.spec, group="given", n=len(one), data_sha256=data_sha256(one))
        for one in unknown
    )
    choice = Choice(
        score="ebo", reason="It was best.", n=len(known), data_sha256=data_sha256(known),
        source_sha256=data_sha256(known), backend="onnxruntime", candidates=(best,),
        ood=(*ood, OodSet(name="noise", group="far", n=9)),
    )  # fmt: skip
    gate = dataclasses.replace(bundle.gate(), choice=choice)
    return dataclasses.replace(bundle, gates={"default": gate})


def test_sets_that_chose_the_score_are_told(bundle):
    gated = chosen(bundle, arrays(1), arrays(3))
    plain = measured(gated, near={"a": arrays(2)}, far={"f": arrays(3)}, limit=30)
    assert plain["checks"]["chosen_on"] == [
        {"group": "id", "set": "ID"}, {"group": "far", "set": "f"},
    ]  # fmt: skip
    (said,) = [one for one in plain["findings"] if one["about"] == "choice"]
    assert said["state"] == "fair"
    assert said["text"].startswith(
        "2 of these sets were used to choose the score ebo (the known images, f), so"
    )
    part = measured(gated, id=arrays(4), far={"f": arrays(3).select(range(9))})
    assert part["checks"]["chosen_on"] == []
    assert "It was best." in render(plain)


def test_a_score_that_was_named_was_chosen_on_nothing(bundle):
    plain = measured(bundle, far={"f": arrays(3)})
    assert plain["checks"]["chosen_on"] == []
    assert not any(one["about"] == "choice" for one in plain["findings"])


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


@pytest.mark.parametrize("logits", [np.nan, np.inf])
def test_a_model_that_scores_no_known_image_is_called_broken(bundle, monkeypatch, logits):
    plain_raw = Predictor.raw

    def broken(self, pixels):
        outputs = plain_raw(self, pixels)
        return {**outputs, "logits": np.full_like(outputs["logits"], logits)}

    monkeypatch.setattr(Predictor, "raw", broken)
    plain = measured(bundle, far={"f": arrays(3)}, resamples=20)
    (said,) = [one for one in plain["findings"] if one["about"] == "scores"]
    assert said["state"] == "bad"
    assert said["text"].startswith("The score ebo of every known image is NaN or infinite")
    assert not any(one["about"] == "far" for one in plain["findings"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("knn", "does not carry the score knn; it carries msp, ebo, mls, unknown. It needs the "
         "model's features and constants of its training images: export"),
        ("temperature", "does not carry the score temperature; .* It needs constants of its"),
        ("odin", "odin needs the gradient of the model by its input, which no bundle has"),
        ("EBO", "the score EBO: none is called so. Perhaps ebo is meant"),
        ("entropy", "the score entropy: none is called so. There are msp, ebo, mls, unknown, t"),
    ],
)  # fmt: skip
def test_a_score_that_is_not_carried_says_what_it_would_take(bundle, name, message):
    with pytest.raises(UsageError, match=message):
        measured(bundle, scores=["ebo", name])


@pytest.mark.parametrize(("n", "said"), [(1, "1 image is too few"), (5, "5 images are too few")])
def test_a_few_images_prove_nothing(bundle, n, said):
    plain = measured(bundle, far={"f": arrays(3)}, limit=n, resamples=20)
    assert sum(said in warning for warning in plain["warnings"]) == 2
    (about,) = [one for one in plain["findings"] if one["about"] == "far"]
    assert "not known by so few images" in about["text"]
    assert about["state"] == "none"
    low, high = plain["scores"]["ebo"]["far"]["auroc_ci95"]
    assert high - low > 0.3


def test_a_promise_needs_images_enough_to_be_broken():
    gate = {**GATE, "id": {"n": 19, "accept": 1.0, "accept_ci95": [0.8, 1.0]}, "near": None}
    (said,) = findings(gate, {"ebo": {"near": None, "far": None}}, None)
    assert said["state"] == "none"
    assert said["text"].startswith("19 known images are too few to check what was promised")
    gate["id"] = {"n": 19, "accept": 0.0, "accept_ci95": [0.0, 0.2]}
    assert findings(gate, {"ebo": {"near": None, "far": None}}, None)[0]["state"] == "bad"


def test_near_chance_is_guessing_and_not_a_reversal(bundle):
    halves = images(400, seed=9)
    known, other = (Source(spec="h", items=list(halves[i::2])) for i in (0, 1))
    plain = measured(bundle, id=known, far={"f": other}, resamples=20)
    (about,) = [one for one in plain["findings"] if one["about"] == "far"]
    assert "no better than guessing" in about["text"]
    assert not any("ranks it above" in warning for warning in plain["warnings"])


def test_classes_without_images_are_named(bundle):
    labels = np.zeros(N, np.int64)
    plain = measured(bundle, id=arrays(1, labels=labels, class_names=CLASSES))
    assert any(
        w.startswith("None of the known images is of 2 of the 3 classes (dog, bird)")
        for w in plain["warnings"]
    )
    every = measured(bundle, id=arrays(1, labels=np.arange(N) % 3, class_names=CLASSES))
    assert not any("None of the known images" in w for w in every["warnings"])


def test_grey_sets_for_a_model_of_colours_are_told(tmp_path):
    coloured = make_bundle(tmp_path / "rgb", channels=3)
    rgb = [Source(spec=f"c{s}", items=list(images(N, channels=3, seed=s))) for s in (1, 2)]
    grey = Source(spec="g", items=[np.repeat(one, 3, axis=2) for one in images(N, seed=3)])
    said = measured(coloured, id=rgb[0], near={"c": rgb[1]}, far={"g": grey})["warnings"]
    (warning,) = [one for one in said if "colour" in one]
    assert warning.startswith("g: 100% of its images are grey, of the known ones 0%")
    turned = measured(coloured, id=grey, far={"c": rgb[0]})["warnings"]
    assert any(w.startswith("c: 0% of its images are grey, of the known ones 100%") for w in turned)
    alike = measured(coloured, id=grey, far={"g": grey})["warnings"]
    assert not any("colour" in one for one in alike)


def test_the_name_of_the_known_images_is_theirs(bundle):
    with pytest.raises(UsageError, match="ID stands for the known images"):
        measured(bundle, far={"ID": arrays(3)})


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
    gate = {**GATE, "id": {"n": N, "accept": accept, "accept_ci95": ci}, "near": {"reject": 0.6}}
    promise, near = findings(gate, SCORES, None)
    assert (promise["about"], promise["state"]) == ("promise", state)
    assert text in promise["text"]
    assert near["text"] == (
        "Telling near unknown images from known ones: fair (AUROC 91.0% by ebo, good by itself, "
        "but the gate lets 40.0% of them through). The score msp does better here: 95.0%."
    )


@pytest.mark.parametrize(
    ("area", "reject", "state", "text"),
    [
        (0.993, 0.96, "good", "excellent (AUROC 99.3% by ebo; the gate lets 4.0% of them"),
        (0.993, 0.64, "fair", "fair (AUROC 99.3% by ebo, excellent by itself, but the gate lets"),
        (0.993, 0.0, "bad", "poor (AUROC 99.3% by ebo, excellent by itself, but the gate"),
        (0.7, 0.999, "bad", "weak (AUROC 70.0% by ebo; the gate lets 0.1% of them"),
        (0.3, 0.9, "bad", "the wrong way round (AUROC 30.0% by ebo; the gate lets 10.0% of them"),
    ],
)  # fmt: skip
def test_what_is_told_apart_is_no_better_than_what_the_gate_catches(area, reject, state, text):
    known = {"n": N, "accept": 0.96, "accept_ci95": [0.95, 0.97]}
    gate = {**GATE, "id": known, "near": {"reject": reject}}
    near = findings(gate, {"ebo": {"near": {"auroc": area}, "far": None}}, None)[1]
    assert near["state"] == state
    assert text in near["text"]


@pytest.mark.parametrize(("other", "better"), [(0.024, False), (0.49, False), (0.52, True)])
def test_worse_than_guessing_is_not_better(other, better):
    scores = {"ebo": {"near": None, "far": {"auroc": 0.001}}}
    scores["msp"] = {"near": None, "far": {"auroc": other}}
    _, far = findings(None, scores, None)
    assert ("The score msp does better here" in far["text"]) is better


@pytest.mark.parametrize(
    ("accuracy", "ci", "state"),
    [(0.99, [0.98, 1.0], "good"), (0.97, [0.96, 0.985], "fair"), (0.9, [0.88, 0.92], "bad"),
     (None, None, "none")],
)  # fmt: skip
def test_a_promised_error_is_judged_by_the_errors(accuracy, ci, state):
    known = {"n": N, "accept": 0.5, "accept_ci95": [0.4, 0.6]}
    known |= {"accuracy": accuracy, "accuracy_ci95": ci}
    gate = {**GATE, "method": "risk", "risk": 0.02, "id": known, "near": {"reject": 0.6}}
    assert findings(gate, SCORES, None)[0]["state"] == state


def test_without_a_gate_nothing_is_promised():
    promise, near = findings(None, SCORES, None)
    assert promise["state"] == "none"
    assert "the gate" not in near["text"]
