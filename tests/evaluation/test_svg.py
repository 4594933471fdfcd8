"""Axes and pictures."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.evaluation import svg
from moon.evaluation.plots import reliability_plot, ridge_plot, risk_plot, roc_plot
from tests.evaluation.samples import report


def test_ticks_by_hand():
    assert [shown for _, shown in svg.linear_ticks(0, 1)] == [
        "0.0", "0.2", "0.4", "0.6", "0.8", "1.0"
    ]  # fmt: skip
    assert [shown for _, shown in svg.linear_ticks(-12, 13)] == ["−10", "−5", "0", "5", "10"]
    assert [shown for _, shown in svg.linear_ticks(0, 0.01)][:2] == ["0.000", "0.002"]


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_lie_inside_and_are_a_handful(low, span):
    ticks = svg.linear_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert all(low - slack <= at <= low + span + slack for at, _ in ticks)
    assert 2 <= len(ticks) <= 11


def test_probability_ticks_sit_at_their_log_odds():
    ticks = svg.probability_ticks(-3, 8, negative=False)
    assert [shown for _, shown in ticks] == ["0.1", "0.5", "0.9", "0.99", "0.999"]
    assert ticks[1][0] == 0.0
    assert ticks[2][0] == pytest.approx(2.1972, abs=1e-4)
    negative = svg.probability_ticks(-3, 8, negative=True)
    assert [shown for _, shown in negative] == ["−0.9", "−0.5", "−0.1", "−0.01", "−0.001"]
    assert negative[2][0] == pytest.approx(2.1972, abs=1e-4)


def test_pictures_are_well_formed_and_described():
    plain = report(n=300, near=("<b>&\"'",))
    ebo = plain["scores"]["ebo"]
    drawn = plain["plots"]["scores"]
    aurcs = {name: s["aurc"] for name, s in plain["scores"].items()}
    curves = {name: entry["risk_coverage"] for name, entry in drawn.items()}
    pictures = [
        ridge_plot("ebo", drawn["ebo"]["histogram"], plain["gate"], ebo),
        ridge_plot("msp", drawn["msp"]["histogram"], None, plain["scores"]["msp"]),
        roc_plot("ebo", drawn["ebo"]["roc"], plain["gate"], ebo),
        reliability_plot(plain["plots"]["reliability"], plain["id"]["ece"]),
        risk_plot(curves, plain["gate"], aurcs),
    ]
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 20
        assert "nan" not in picture
        assert "inf" not in picture.lower().replace("information", "")


def test_a_ridge_says_the_share_accepted_of_each_set():
    plain = report(n=300)
    picture = ridge_plot(
        "ebo", plain["plots"]["scores"]["ebo"]["histogram"], plain["gate"], plain["scores"]["ebo"]
    )
    label = ElementTree.fromstring(picture).get("aria-label")
    reject = plain["gate"]["far"]["sets"]["mnist"]["reject"]
    assert f"mnist {100 * (1 - reject):.1f}%" in label
