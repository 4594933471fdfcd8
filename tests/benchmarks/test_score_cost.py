"""benchmarks/score_cost.py, plausible.py, head_alone.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.export.session import Session
from moon.scores import SCORE_TABLE


@pytest.fixture(scope="module")
def model(scripts):
    return scripts["plausible"].plausible("cnn", 16, 0.95, 600, 0)


def test_a_random_network_is_made_to_use_its_classes(model):
    assert np.bincount(model.labels, minlength=10).min() > 5
    assert model.images.shape == (600, 16, 16, 3)


@pytest.mark.parametrize("name", [None, "temperature", "klm", "fdbd", "knn"])
def test_a_head_alone_answers_as_the_whole_does(scripts, model, name):
    fitted = () if name is None else scripts["score_cost"].fit(model, [name], every=False)[0]
    whole = model.with_head(fitted)
    image = {"input": model.preprocess.normalise(model.images[:5])}
    body = Session(model.with_head(features=True)).run(image)
    feeds = {"logits": body["logits"], model.features: body["features"]}
    found = Session(scripts["head_alone"].head_alone(whole, feeds)).run(feeds)
    expected = Session(whole).run(image)
    assert set(found) == set(expected) - {"logits"}
    for output, values in found.items():
        np.testing.assert_allclose(values, expected[output], rtol=1e-4, err_msg=output)


def test_constants_are_those_of_the_graph(scripts, model):
    cost = scripts["score_cost"]
    sizes = {
        name: cost.constants_bytes(model, cost.fit(model, [name], every=False)[0][0])
        for name in ("klm", "knn", "react")
    }
    bank = min(1000, len(model.images))
    width = (
        Session(model.with_head(features=True))
        .run({"input": model.preprocess.normalise(model.images[:1])})["features"]
        .shape[1]
    )
    assert sizes["klm"] == 4 * 10**2
    assert 0 <= sizes["knn"] - 4 * bank * width < 64
    assert sizes["react"] < 64  # the weights are the model's


def test_the_table(scripts, tmp_path, capsys):
    words = ["--model", "cnn", "--size", "16", "--images", "600", "--rounds", "3", "--json"]
    assert scripts["score_cost"].main([*words, str(tmp_path / "cost.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "cost.json").read_text())
    # All that need constants, and gen.
    assert not found["left_out"] and len(found["scores"]) == len(SCORE_TABLE) - 4
    assert all(name in said for name in found["scores"])
    assert found["model_ms"]["median"] > 0 and found["call_us"]["median"] > 0
    low, high = found["scores"]["vim"]["share"]["ci95"]
    assert low <= found["scores"]["vim"]["share"]["median"] <= high


def test_wrong_arguments(scripts, capsys):
    assert scripts["score_cost"].main(["--scores", "odin"]) == 2
    assert "odin" in capsys.readouterr().err
