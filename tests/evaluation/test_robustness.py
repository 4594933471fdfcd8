"""Corrupted inputs, classes and examples of tiny bundles, against computations of their own."""

from __future__ import annotations

import base64
import copy
import io

import numpy as np
import pytest
from PIL import Image

from moon.class_calibration import calibrate_per_class
from moon.data.items import Source
from moon.errors import UsageError
from moon.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupt, reencoded
from moon.evaluation.evaluate import evaluate
from moon.evaluation.findings import findings
from moon.gate_calibration import Promise
from moon.runtime.predictor import Predictor
from tests.bundles import CLASSES, images, make_bundle

N = 90


def arrays(seed, *, labels=True):
    given = np.random.default_rng(seed).integers(3, size=N) if labels else None
    names = CLASSES if labels else None
    return Source(
        spec=f"drawn{seed}", items=list(images(N, seed=seed)), labels=given, class_names=names
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", reject=0.2)


@pytest.fixture(scope="module")
def plain(bundle):
    options = {"near": {"n": arrays(2, labels=False)}, "far": {"f": arrays(3, labels=False)}}
    return evaluate(bundle, id=arrays(1), batch_size=16, resamples=0, **options).to_json()


def test_every_corruption_equals_its_own_computation(bundle, plain):
    known, found = arrays(1), plain["corruptions"]
    pixels = np.stack(known.items)
    assert (found["n"], found["of"]) == (N, N)
    assert list(found["kinds"]) == list(CORRUPTIONS)
    for kind in CORRUPTIONS:
        for row, strength in zip(found["kinds"][kind], STRENGTHS, strict=True):
            out = Predictor.open(bundle).raw(corrupt(pixels, kind, strength))
            right = out["label"] == known.labels
            assert row["strength"] == strength
            assert row["accuracy"] == right.mean()
            assert row["abstain"] == (~out["accept"]).mean()
            assert row["wrong_accepted"] == (out["accept"] & ~right).mean()
            kept = out["accept"]
            assert row["accuracy_accepted"] == (right[kept].mean() if kept.any() else None)
            low, high = row["abstain_ci95"]
            assert low <= row["abstain"] <= high
    assert found["clean"]["abstain"] == pytest.approx(1 - plain["gate"]["id"]["accept"])


def test_fewer_images_cost_less_and_none_nothing(bundle):
    some = evaluate(bundle, id=arrays(1), corruptions=10, resamples=0).to_json()
    assert (some["corruptions"]["n"], some["corruptions"]["of"]) == (10, N)
    none = evaluate(bundle, id=arrays(1), corruptions=0, resamples=0).to_json()
    assert none["corruptions"] is None
    assert not any(one["about"] == "corruptions" for one in none["findings"])
    with pytest.raises(UsageError, match="corruptions must be 0 or more"):
        evaluate(bundle, id=arrays(1), corruptions=-1)


def test_no_corruption_is_named_the_worst_where_none_is_wrong(plain):
    def said(figures):
        found = findings(plain["gate"], plain["scores"], figures)
        return [one["text"] for one in found if one["about"] == "corruptions"]

    assert "at worst" in said(plain["corruptions"])[0]
    never = copy.deepcopy(plain["corruptions"])
    rows = [row for rows in never["kinds"].values() for row in rows]
    for i, row in enumerate(rows):
        row["wrong_accepted"], row["abstain"] = 0.0, i / len(rows)
    (text,) = said(never)
    assert "none is accepted with a wrong label; up to 96.0% are rejected" in text


def test_the_line_of_a_gate_by_class_is_no_threshold(plain, tmp_path):
    bundle = make_bundle(tmp_path / "own", reject=0.2)
    gate = bundle.gate()
    values, predicted = np.linspace(-5, 5, 200), np.arange(200) % len(CLASSES)
    by_class = calibrate_per_class(
        values, predicted, bundle.classes, Promise.of(0.2), score=gate.score
    )
    found = evaluate(
        bundle.with_gate(by_class), id=arrays(1), batch_size=16, resamples=0, corruptions=0
    ).to_json()
    histogram = found["plots"]["scores"][gate.score]["histogram"]
    known = plain["plots"]["scores"][gate.score]["histogram"]
    assert known["line"] == pytest.approx(gate.threshold)
    kept = sum(histogram["id"][np.searchsorted(histogram["edges"], histogram["line"]) :])
    assert kept == pytest.approx(0.95, abs=0.06)
    assert histogram["line"] != pytest.approx(by_class.threshold)


def test_progress_counts_the_corrupted_ones_too(bundle):
    ticks = []
    evaluate(
        bundle, id=arrays(1), corruptions=20, resamples=0,
        progress=lambda done, total, what: ticks.append((done, total)),
    )  # fmt: skip
    assert ticks[-1] == (N + 26 * 20, N + 26 * 20)


def test_without_labels_or_gate_what_is_unknown_is_none(bundle, tmp_path):
    unlabelled = evaluate(bundle, id=arrays(1, labels=False), resamples=0).to_json()
    row = unlabelled["corruptions"]["kinds"]["blur"][4]
    assert row["accuracy"] is row["wrong_accepted"] is None
    assert row["abstain"] is not None
    bare = make_bundle(tmp_path / "bare", calibrated=False)
    ungated = evaluate(bare, id=arrays(1), resamples=0).to_json()
    row = ungated["corruptions"]["kinds"]["blur"][4]
    assert row["abstain"] is row["wrong_accepted"] is None
    assert row["accuracy"] is not None
    assert "examples" not in ungated["plots"]


def test_classes_add_up(bundle, plain):
    known = arrays(1)
    out = Predictor.open(bundle).raw(np.stack(known.items))
    far = Predictor.open(bundle).raw(np.stack(arrays(3).items))
    assert [one["name"] for one in plain["classes"]] == list(CLASSES)
    for i, one in enumerate(plain["classes"]):
        mine = out["label"] == i
        kept = mine & out["accept"]
        assert one["n"] == mine.sum()
        assert one["abstain"] == (None if not mine.any() else (~out["accept"])[mine].mean())
        assert one["right"] == (None if not kept.any() else (known.labels[kept] == i).mean())
        assert one["far"] == (far["accept"] & (far["label"] == i)).sum()


def test_examples_are_the_clearest_mistakes_and_show_the_image(bundle, plain):
    known = arrays(1)
    out = Predictor.open(bundle).raw(np.stack(known.items))
    right = out["label"] == known.labels
    examples = plain["plots"]["examples"]
    lost = np.flatnonzero(~out["accept"] & right)
    first = lost[np.argsort(out["score"][lost], kind="stable")][:8]
    shown = examples["right rejected"]
    assert [one["source"] for one in shown] == [f"drawn1[{i}]" for i in first]
    assert all(one["predicted"] == one["label"] for one in shown)
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0]["png"])))
    assert np.array_equal(np.asarray(picture), known.items[first[0]][..., 0])
    wrong = examples["wrong accepted"]
    assert 0 < len(wrong) <= 8
    assert all(one["predicted"] != one["label"] for one in wrong)
    assert [one["score"] for one in wrong] == sorted((one["score"] for one in wrong), reverse=True)
    sets = [one["set"] for one in examples["unknown accepted"]]
    assert sets == ["n"] * 4 + ["f"] * 4


def test_reencoding_treats_every_set_alike(bundle):
    known, far = arrays(1), arrays(3)
    worse = [
        Source(spec=s.spec, items=[reencoded(x, 30) for x in s.items], labels=s.labels,
               class_names=s.class_names)
        for s in (known, far)
    ]  # fmt: skip
    by_hand = evaluate(bundle, id=worse[0], far={"f": worse[1]}, resamples=0).to_json()
    found = evaluate(bundle, id=known, far={"f": far}, jpeg=30, resamples=0).to_json()
    assert found["jpeg"] == 30
    assert "Of images re-encoded as JPEG 30 nothing was promised" in found["findings"][0]["text"]
    for part in ("scores", "gate", "id", "corruptions", "classes", "plots"):
        assert found[part] == by_hand[part], part
    plainly = evaluate(bundle, id=known, far={"f": far}, resamples=0).to_json()
    assert plainly["jpeg"] is None
    assert plainly["scores"] != found["scores"]
    with pytest.raises(UsageError, match="jpeg a quality from 1 to 100"):
        evaluate(bundle, id=known, jpeg=0)
