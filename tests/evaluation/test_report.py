"""report.json: the contract's fields, its arithmetic, and the words of the verdict."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.errors import MoonError, UsageError
from moon.evaluation.measure import plot_figures, score_figures
from moon.evaluation.metrics import OOD_METRICS, auroc
from moon.evaluation.observe import Observed
from moon.evaluation.report import percent, verdict
from tests.evaluation.samples import drawn, drawn_report, report


def observed(*values, accepted=None):
    scores = np.array(values, float)
    n = len(scores)
    kept = np.ones(n, bool) if accepted is None else np.array(accepted)
    return Observed({"ebo": scores}, {}, kept, np.zeros(n, np.int64), np.full(n, 0.5))


def test_the_contract_fields_are_there_and_it_is_valid_json():
    plain = json.loads(json.dumps(report(n=400), allow_nan=False))
    assert {"id", "scores", "gate", "model"} <= set(plain)
    assert {"n", "accuracy", "ece"} <= set(plain["id"])
    assert {"sparsity", "nonzeros", "flops"} <= set(plain["model"])
    assert set(plain["scores"]) == {"msp", "ebo", "mls", "unknown"}
    for score in plain["scores"].values():
        for group in ("near", "far"):
            assert {*OOD_METRICS, "sets"} <= set(score[group])
            for figures in score[group]["sets"].values():
                assert {"n", *OOD_METRICS} <= set(figures)
                assert all(0 <= figures[name] <= 1 for name in OOD_METRICS)
    assert {"threshold", "method", "alpha", "achieved"} <= set(plain["gate"])
    assert "scores" not in plain["gate"]


def test_a_group_is_the_unweighted_mean_of_its_sets_and_never_pooled():
    known = observed(2.0, 3.0, 4.0)
    small, large = observed(1.0), observed(*[5.0] * 9)
    groups = {"near": {"small": small, "large": large}, "far": {}}
    figures = score_figures("ebo", known, groups, None, 0)
    assert figures["near"]["sets"]["small"]["auroc"] == 1.0
    assert figures["near"]["sets"]["large"]["auroc"] == 0.0
    assert figures["near"]["auroc"] == 0.5
    assert auroc([2, 3, 4], [1, *[5] * 9]) == pytest.approx(0.1)
    assert figures["far"] is None
    assert figures["aurc"] is None


def test_the_means_have_intervals_of_their_own():
    plain = report(n=600)
    for score in plain["scores"].values():
        for group in ("near", "far"):
            figures = score[group]
            for name in ("auroc", "fpr95_id_pos", "fpr95_ood_pos"):
                low, high = figures[f"{name}_ci95"]
                assert low <= figures[name] <= high
                widths = [np.ptp(one[f"{name}_ci95"]) for one in figures["sets"].values()]
                assert 0 < high - low < max(widths), "a mean is surer than its least sure part"
    caught = plain["gate"]["far"]
    assert caught["reject_ci95"][0] < caught["reject"] < caught["reject_ci95"][1]
    alone = report(n=300, near=("one",))["scores"]["ebo"]["near"]
    assert alone["auroc_ci95"] == alone["sets"]["one"]["auroc_ci95"]
    known = observed(*range(50))
    plain = score_figures("ebo", known, {"near": {"a": observed(*range(30))}, "far": {}}, None, 0)
    assert plain["near"]["auroc_ci95"] is None, "no resamples, no intervals"


def test_further_bundles_stand_under_compared():
    plain = report(names=("one", "two"), n=300)
    assert plain["model"]["name"] == "one"
    assert [b["model"]["name"] for b in plain["compared"]] == ["two"]
    assert set(plain["compared"][0]) < set(plain)


def test_histograms_hold_every_image_and_the_threshold():
    known = observed(-np.inf, 1.0, 2.0, 3.0)
    groups = {"near": {"a": observed(0.0, np.inf)}, "far": {}}
    histogram = plot_figures(known, groups, None, {"ebo": 40.0})["scores"]["ebo"]["histogram"]
    assert sum(histogram["id"]) == pytest.approx(1)
    assert sum(histogram["near"]["a"]) == pytest.approx(1)
    assert histogram["scale"] == "linear"
    assert histogram["edges"][0] <= histogram["line"] <= histogram["edges"][-1]
    assert histogram["line"] == 40.0


def test_without_a_threshold_the_line_keeps_95_percent_of_the_known():
    known = observed(*np.arange(100.0))
    histogram = plot_figures(known, {"near": {}, "far": {}}, None, {})["scores"]["ebo"]["histogram"]
    assert histogram["line"] == 5.0


def test_probabilities_are_spread_by_their_log_odds():
    seen, labels = drawn(200, 8.0, None, seed=0)
    plots = plot_figures(seen, {"near": {}, "far": {}}, labels, {})["scores"]
    assert plots["msp"]["histogram"]["scale"] == "probability"
    assert plots["unknown"]["histogram"]["scale"] == "-probability"
    assert plots["ebo"]["histogram"]["scale"] == "linear"
    # Spread: no bin holds most of the images, as the one at p = 1 otherwise would.
    assert max(plots["msp"]["histogram"]["id"]) < 0.3


def test_constant_scores_still_make_a_histogram():
    known = observed(1.0, 1.0)
    histogram = plot_figures(known, {"near": {}, "far": {}}, None, {})["scores"]["ebo"]["histogram"]
    assert max(histogram["id"]) == 1.0


GATE = {
    "id": {"accept": 0.952, "accuracy": 0.989},
    "near": {"reject": 0.87},
    "far": {"reject": 0.9931},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {},
            "Accepts 95.2% of known inputs at 98.9% accuracy; "
            "catches 87.0% of near and 99.3% of far unknown inputs.",
        ),
        (
            {"near": None},
            "Accepts 95.2% of known inputs at 98.9% accuracy; catches 99.3% of far unknown inputs.",
        ),
        ({"near": None, "far": None}, "Accepts 95.2% of known inputs at 98.9% accuracy."),
        (
            {"id": {"accept": 0.9999, "accuracy": None}, "far": None},
            "Accepts over 99.9% of known inputs; catches 87.0% of near unknown inputs.",
        ),
    ],
)
def test_verdict(change, expected):
    assert verdict({}, {**GATE, **change}, {}) == expected


def test_verdict_of_an_uncalibrated_bundle_says_so():
    scores = {
        "msp": {"near": {"auroc": 0.8}, "far": None},
        "ebo": {"near": {"auroc": 0.9}, "far": None},
    }
    assert verdict({"accuracy": 0.93}, None, scores) == (
        "Not calibrated: without a threshold it cannot tell known from unknown inputs yet. "
        "It names 93.0% of known inputs rightly. Best AUROC: 90.0% of near (score ebo)."
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "100%"), (0.9996, "over 99.9%"), (0.0004, "under 0.1%"), (0.0, "0%"), (0.5, "50.0%")],
)
def test_percent_never_rounds_to_perfect(value, shown):
    assert percent(value) == shown


def test_writing_makes_the_folder_and_both_files(tmp_path):
    one = drawn_report(n=200)
    one.write(tmp_path / "new" / "folder")
    plain = json.loads((tmp_path / "new/folder/report.json").read_text())
    assert plain == json.loads(json.dumps(one.to_json()))
    assert "<!doctype html>" in (tmp_path / "new/folder/report.html").read_text()


def test_writing_where_a_file_is_is_one_clear_error(tmp_path):
    one = drawn_report(n=200)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        one.write(blocked)
    with pytest.raises(MoonError, match="could not write"):
        one.write(blocked / "below")
