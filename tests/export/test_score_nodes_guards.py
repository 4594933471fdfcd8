from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from moon.errors import ExportError
from moon.export.head import add_head
from moon.export.session import Session
from moon.scores import SCORE_TABLE, restore_score
from tests.export.test_head import passing
from tests.export.test_score_nodes import FITTED, Floats, feed, sample


def skipping(op: str, function: Any) -> type[OpRun]:
    """An operator for the reference evaluator that leaves NaN out, as some runtimes do."""

    class Skipping(OpRun):
        op_domain = ""

        def _run(self, *inputs: Floats, **attributes: Any) -> tuple[Floats, ...]:
            return function(*inputs, **attributes)

    Skipping.__name__ = op
    return Skipping


def _reduce_max(x: Floats, axes: Floats, keepdims: int = 1, **_: Any) -> tuple[Floats]:
    kept = np.where(np.isnan(x), -np.inf, x)
    return (kept.max(axis=int(axes[0]), keepdims=bool(keepdims)).astype(x.dtype),)


def _top_k(x: Floats, k: Floats, axis: int = -1, **_: Any) -> tuple[Floats, Floats]:
    kept = np.where(np.isnan(x), np.float32(-3e38), x)
    order = np.argsort(-kept, axis=1, kind="stable")[:, : int(k[0])]
    return np.take_along_axis(kept, order, axis=1), order


SKIPPING = [
    skipping("ReduceMax", _reduce_max),
    skipping("TopK", _top_k),
    skipping("Max", lambda a, b: (np.fmax(a, b),)),
    skipping("Min", lambda a, b: (np.fmin(a, b),)),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("runtime", ["onnxruntime", "skipping NaN"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_has_no_score(bad: float, runtime: str) -> None:
    chosen = sample(4, 12, 2)
    fitted = chosen.fit()
    model = chosen.graph(fitted)
    x = np.tile(chosen.features[:1], (12, 1))
    x[np.arange(12), np.arange(12)] = bad
    if runtime == "onnxruntime":
        out = Session(model).run(feed(x))
    else:
        evaluator = ReferenceEvaluator(model, new_ops=SKIPPING)
        names = [value.name for value in model.graph.output]
        out = dict(zip(names, evaluator.run(None, feed(x)), strict=True))
    for score in fitted:
        assert np.isnan(out[f"score_{score.name}"]).all(), score.name
        wanted = score.score(features=out["features"], logits=out["logits"])
        assert np.isnan(wanted).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", range(5))
def test_a_logit_that_is_not_finite_is_never_accepted(bad: float, column: int) -> None:
    fitted = sample(4, 12, 2).fit(("temperature", "gen", "klm"))
    logits = np.zeros((1, 5), np.float32)
    logits[0, column] = bad
    for score in fitted:
        model = add_head(
            passing(5),
            outputs=5,
            unknown_index=2,
            fitted=fitted,
            gate_score=score.name,
            threshold=-1e30,
        )
        out = Session(model).run({"input": logits[:, :, None, None]})
        assert np.isnan(out["score"]).all() and not out["accept"].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_that_overflow_have_no_score(sign: int) -> None:
    """Features that are finite, and one logit that is not."""
    chosen = sample(4, 12, 4)
    names = ("vim", "fdbd", "nci", "nnguide")
    features = chosen.features.copy()
    features[:, 0] = 0
    weight = chosen.weight.copy()
    weight[1, 0] = sign * 1e30
    training = dataclasses.replace(
        chosen.training,
        features=features,
        weight=weight,
        logits=features @ weight.T + chosen.bias,
    )
    changed = dataclasses.replace(chosen, training=training, weight=weight, features=features)
    fitted = changed.fit(names)
    x = np.zeros((1, 12), np.float32)
    x[0, 0] = 1e10
    out = Session(changed.graph(fitted)).run(feed(x))
    assert np.isfinite(out["features"]).all() and not np.isfinite(out["logits"]).all()
    for name in names:
        assert np.isnan(out[f"score_{name}"]).all(), name


def test_squares_that_overflow_are_never_accepted() -> None:
    """Finite features whose squares float32 cannot hold: no confident score comes of it."""
    chosen = sample(4, 12, None)
    fitted = chosen.fit()
    x = np.full((2, 12), 1e25, np.float32)
    x[1] *= -1
    out = Session(chosen.graph(fitted)).run(feed(x))
    for score in fitted:
        got = out[f"score_{score.name}"].astype(np.float64)
        with np.errstate(all="ignore"):
            wanted = score.score(features=out["features"], logits=out["logits"])
        # Right, or no number.
        right = np.abs(got - wanted) <= 1e-4 * np.maximum(1, np.abs(wanted))
        assert (right | ~np.isfinite(got)).all(), (score.name, got, wanted)


@pytest.mark.parametrize("name", [n for n in FITTED if "features" in SCORE_TABLE[n].reads])
def test_features_need_a_last_layer(name: str) -> None:
    chosen = sample(4, 12, None)
    with pytest.raises(ExportError, match=f"the score {name} needs features, and the model does"):
        add_head(passing(4), outputs=4, unknown_index=None, fitted=chosen.fit((name,)))


@pytest.mark.parametrize("name", FITTED)
def test_a_score_of_another_model_is_refused(name: str) -> None:
    (score,) = sample(4, 12, None, seed=1).fit((name,))
    for other in (sample(4, 12, 2), sample(4, 9, None), sample(5, 12, None)):
        if name in ("knn", "rmds") and other.features.shape[1] == 12:
            continue  # features of this width are all it knows
        if "features" not in SCORE_TABLE[name].reads and other.outputs == 4:
            continue
        with pytest.raises(ExportError, match=f"the score {name} was fitted to another model"):
            other.graph([score])


@pytest.mark.parametrize("name", ["nci", "react", "scale"])
def test_a_last_layer_of_other_weights_is_refused(name: str) -> None:
    (score,) = sample(4, 12, None, seed=1).fit((name,))
    with pytest.raises(ExportError, match=f"the score {name} was fitted to another model"):
        sample(4, 12, None, seed=2).graph([score])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("react", "clip", 1e39),
        ("temperature", "temperature", 1e-60),
        ("vim", "alpha", 1e300),
        ("fdbd", "gaps", 1e-60),
        ("klm", "log_means", -1e39),
    ],
)
def test_constants_that_float32_cannot_hold(name: str, field: str, value: float) -> None:
    chosen = sample(4, 12, None)
    (score,) = chosen.fit((name,))
    arrays = score.to_arrays()
    wrong = restore_score(name, {**arrays, field: np.full(arrays[field].shape, value)})
    with pytest.raises(ExportError, match=rf"of the score {name} holds .*, which float32 cannot"):
        chosen.graph([wrong])
