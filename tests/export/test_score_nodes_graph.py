from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from moon.data.preprocess import Preprocess
from moon.export.classifier import classifier_nodes
from moon.export.graph import array, initializers
from moon.export.half import to_half
from moon.export.head import add_head, add_normalisation
from moon.export.pack import pack, round_values
from moon.export.session import Session
from moon.scores import Training, fit_score
from tests.export.test_score_nodes import FITTED, feed, hard, sample


def test_batches_of_any_size_give_the_same() -> None:
    chosen = sample(10, 64, 10)
    fitted = chosen.fit()
    session = Session(chosen.graph(fitted, p_values=True))
    x = chosen.features[:64]
    whole = session.run(feed(x))
    for size in (1, 2, 7, 33):
        part = session.run(feed(x[:size]))
        for name, value in part.items():
            np.testing.assert_allclose(
                value.astype(float), whole[name][:size].astype(float), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize(
    ("weights", "values"),
    [("compact", "fp32"), ("compact", "fp16"), ("dense", "fp16"), ("coo", "fp32")],
)
def test_packing_leaves_the_scores(weights: Any, values: Any) -> None:
    chosen = sample(10, 256, 10)
    rng = np.random.default_rng(0)
    weight = np.where(rng.random(chosen.weight.shape) < 0.9, 0, chosen.weight).astype(np.float32)
    logits = chosen.features @ weight.T + chosen.bias
    training = dataclasses.replace(chosen.training, weight=weight, logits=logits)
    chosen = dataclasses.replace(chosen, training=training, weight=weight)
    fitted = chosen.fit(tuple(name for name in FITTED if name != "klm"))
    model = chosen.graph(fitted, p_values=True)
    packed = pack(model, weights=weights, values=values)
    if weights != "coo":
        onnx.checker.check_model(packed, full_check=True)
    before, after = initializers(model), initializers(packed)
    assert "w" not in after
    for name in before:
        assert name == "w" or after[name] == before[name], name
    x = hard(chosen)[:30]
    wanted = Session(round_values(model, values)).run(feed(x))
    got = Session(packed).run(feed(x))
    for name in wanted:
        assert wanted[name].tobytes() == got[name].tobytes(), name


def test_a_body_in_fp16_and_pixels(body: ModelProto) -> None:
    half = to_half(body)
    weight, bias = (array(initializers(body)[n]) for n in classifier_nodes(body)[0].input[1:])
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    preprocess = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))
    plain = add_head(half, outputs=11, unknown_index=10, features=True)
    seen = Session(plain).run({"input": preprocess.normalise(pixels)})
    assert seen["features"].dtype == np.float32
    training = Training(
        features=seen["features"],
        logits=seen["logits"],
        labels=np.where(np.arange(300) % 9 == 0, np.arange(300) % 10, seen["label"]),
        weight=weight,
        bias=bias,
        unknown_index=10,
    )
    fitted = [fit_score(name, training) for name in FITTED if name != "klm"]
    model = add_head(half, outputs=11, unknown_index=10, fitted=fitted, features=True)
    model = add_normalisation(model, preprocess)
    onnx.checker.check_model(model, full_check=True)
    out = Session(model).run({"input": pixels})
    for score in fitted:
        wanted = score.score(features=out["features"], logits=out["logits"])
        size = np.maximum(max(1, wanted.std()), np.abs(wanted))
        assert (np.abs(out[f"score_{score.name}"] - wanted) < 1e-4 * size).all(), score.name


def test_little_is_stored_and_nothing_twice() -> None:
    chosen = sample(10, 512, 10, count=3000)
    fitted = chosen.fit(tuple(n for n in FITTED if n not in ("knn", "nnguide", "vim")))
    model = chosen.graph(fitted)
    held = {name: array(tensor) for name, tensor in initializers(model).items()}
    own = {name: value for name, value in held.items() if name.startswith("head/")}
    large = {name: value.shape for name, value in own.items() if value.size > 1024}
    assert large == {"head/rmds/project": (512, 9)}
    values = [value.tobytes() for value in own.values() if value.size > 1]
    assert len(set(values)) == len(values)
    gate = {"threshold", "thresholds", "gate_score"}
    assert {name for name in held if not name.startswith("head/")} == {"w", "b"} | gate
    nodes = [(node.op_type, tuple(node.input), str(node.attribute)) for node in model.graph.node]
    assert len(set(nodes)) == len(nodes)


def test_only_operators_that_runtimes_share() -> None:
    chosen = sample(4, 12, 2)
    model = chosen.graph(chosen.fit(), p_values=True)
    used = {node.op_type for node in model.graph.node}
    assert not used & {"NonZero", "Unique", "Loop", "If", "Scan", "ReduceLogSumExp", "CumSum"}
    assert all(node.domain == "" for node in model.graph.node)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert types == {TensorProto.FLOAT, TensorProto.INT64}
    assert (model.ir_version, model.opset_import[0].version) == (10, 18)
    assert not any(tensor.data_location for tensor in model.graph.initializer)
